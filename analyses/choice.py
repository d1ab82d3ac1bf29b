"""What does a defense of `task: choice` do to what is to be forgotten, and to what is to be left alone?

    python analyses/choice.py [DEFENSE.yaml]

Over the questions that the model answers rightly in all 24 orders without the defense: the share of orders that it
still answers rightly with it, and of questions that it still answers rightly in all of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from einops import rearrange

from recover import load_config
from recover.defenses.defended import clamp_edits
from recover.run.setting import build_defense, load_setting, select_features
from recover.tasks.choice import ORDERS, draw, kept, right
from recover.tasks.questions import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=Path(__file__).parent / "choice_toy.yaml")
    setting = load_setting(load_config(parser.parse_args().config))
    defense = build_defense(setting, select_features(setting, setting.batch_size))
    options = setting.config.prompts.model_dump()
    for kind in ("forget", "retain"):
        asked = draw(load(options[kind]), options["n"], options["seed"])
        known = kept(setting.model, asked)
        every = [(question, order) for question in known for order in ORDERS]
        answered = rearrange(right(setting.model, every, clamp_edits(defense)), "(q o) -> q o", o=len(ORDERS))
        print(
            f"{kind}: {len(asked)} questions, {len(known)} right in all orders; with the defense "
            f"{float(answered.float().mean()):.1%} of their orders, {int(answered.all(dim=1).sum())} in all"
        )
        print(f"  questions with most orders wrong: {int((answered.float().mean(dim=1) < 0.5).sum())}")


if __name__ == "__main__":
    main()
