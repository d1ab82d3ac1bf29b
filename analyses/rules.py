"""What does the model still know? One perturbation for all prompts, by the behavior's own rule and by other rules.

1. *Fit*, on a part of the prompts: a perturbation that brings back the right answers; others that impose another rule,
   such as the first name of each prompt, or always the same answer.
2. *Read*, on the other part: which answer shows, and the smallest norm at which each rule does.
3. *Judge*: can the answers still be read from the defended state? Does the own rule come back more easily than others?

    python analyses/rules.py [DEFENSE.yaml] [--n 64] [--json FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recover.protocol import InMemoryStore, Knowledge, Transfer, run_transfer
from recover.run import build_bench, load_config, load_setting, shown


def table(shared: Transfer, known: Knowledge) -> str:
    """What was found, for people."""
    lines = [
        f"{known.prompts} prompts that are right without the defense, {known.fits} fits of each rule",
        "     norm  of residual  unseen flips right  random directions  clamp undone",
    ]
    for at in shared.curve:
        rates = (at.relative_norm, at.heldout_rate, at.random_rate, at.undo_rate)
        share, own, random, undo = ("-" if rate is None else f"{rate:.0%}" for rate in rates)
        lines.append(f"  {at.budget:>7.4g}  {share:>11}  {own:>18}  {random:>17}  {undo:>12}")
    back, kept = known.content.back, known.content.kept
    for name, rate in (("right again", back), ("still right", kept)):
        if rate is not None and rate.rate is not None:
            lines.append(f"{name}: {rate.rate:.0%} of {rate.n} ({rate.interval95[0]:.0%} to {rate.interval95[1]:.0%})")
    lines += [f"content: {known.content.by.content} ({known.content.by.value})", "", f"{'rule':32} holds  median norm"]
    own = "-" if known.rule.median_norm is None else f"{known.rule.median_norm:.3g}"
    lines.append(f"{'the own rule':32} {(back.rate if back and back.rate is not None else 0):>5.0%}  {own:>11}")
    for other in known.rule.others:
        norm = "-" if other.median_norm is None else f"{other.median_norm:.3g}"
        lines.append(
            f"{other.name:32} {other.holds.rate or 0:>5.0%}  {norm:>11}  "
            f"own easier on {other.easier} of {other.n}, harder on {other.harder}"
        )
    return "\n".join([*lines, f"rule: {known.rule.by.rule} ({known.rule.by.value})"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", nargs="?", type=Path, default=Path(__file__).parent / "ioi_smollm2.yaml")
    parser.add_argument("--n", type=int, default=64, help="prompts (default: 64)")
    parser.add_argument("--json", type=Path, help="where to save the figures behind it")
    options = parser.parse_args()
    bench = build_bench(load_setting(load_config(options.defense, {"prompts.n": options.n})))
    with shown() as progress:
        shared, known = run_transfer(bench, InMemoryStore(), progress)
    print(table(shared, known))
    if options.json is not None:
        options.json.write_text(known.model_dump_json(indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
