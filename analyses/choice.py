"""What does a defense of `task: choice` do to what is to be forgotten, and to what is to be left alone?

    python analyses/choice.py [DEFENSE.yaml]

Over the questions that the model answers rightly in all 24 orders without the defense: the share of orders that it
still answers rightly with it, and of questions that it still answers rightly in all of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recover.defenses import clamp_edits
from recover.run import build_bench, load_config, load_setting
from recover.tasks import still_right


def main() -> None:
    """Ask both kinds of questions and print what is left of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=Path(__file__).parent / "choice_toy.yaml")
    config = load_config(parser.parse_args().config)
    bench = build_bench(load_setting(config))
    for kind in ("forget", "retain"):
        found = still_right("choice", bench.model, config.prompts.model_dump(), clamp_edits(bench.defense), kind)
        orders = found.wordings
        print(
            f"{kind}: {found.asked} questions, {len(found.known)} right in all orders; with the defense "
            f"{sum(orders) / len(orders):.1%} of their orders, {sum(map(all, found.known))} in all"
        )
        wrong = sum(sum(question) < len(question) / 2 for question in found.known)
        print(f"  questions with most orders wrong: {wrong}")


if __name__ == "__main__":
    main()
