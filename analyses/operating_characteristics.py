"""How often are `content` and `rule` said falsely, and how often are they decided? Tables drawn with a known truth.

    python analyses/operating_characteristics.py [--tables 300] [--n 24 48]

Each line is one kind of table (`recover.planted.tables`): what is true of it, and how often each statement is called
true and false, for prompts that are all different and for prompts of which three each ask the same thing.
"""

from __future__ import annotations

import argparse

from recover.evidence import Rules, judge_content, judge_rule
from recover.planted import TABLES, drawn_table

SAID = {True: "true", False: "false", None: "-"}


def rates(name: str, n: int, cluster: int, tables: int) -> list[float]:
    """Shares of tables in which content is called true and false, and the rule true and false."""
    rules, world = Rules(), TABLES[name]
    drawn = [drawn_table(world, n, seed, cluster=cluster) for seed in range(tables)]
    said = [(judge_content(table, rules).by.content, judge_rule(table, rules).by.rule) for table in drawn]
    return [sum(one[at] is value for one in said) / tables for at in (0, 1) for value in (True, False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=300, help="tables of each kind (default: 300)")
    parser.add_argument("--n", type=int, nargs="+", default=[24, 48], help="clusters of flips (default: 24 48)")
    options = parser.parse_args()
    print(f"{'':52}{'':>4} {'each':>4}  true of it      content         rule")
    print(f"{'table':52}{'n':>4} {'':>4}  content  rule   true   false   true   false")
    for name, world in TABLES.items():
        for n in options.n:
            for cluster in (1, 3):
                content, absent, rule, easy = rates(name, n * cluster, cluster, options.tables)
                truth = f"{SAID[world.content]:>7}  {SAID[world.rule]:>5}"
                told = f"{content:>6.1%}  {absent:>6.1%}  {rule:>6.1%}  {easy:>6.1%}"
                print(f"{name:52}{n:>4} {cluster:>4}  {truth}  {told}")


if __name__ == "__main__":
    main()
