"""Is a clamp easier to undo at one layer than at another? IOI on SmolLM2, 32 features clamped at each of three layers.

Each point of the figure is a prompt: the norm of the smallest perturbation that brings its answer back with the clamped
features held, against how far the clamp itself moves the residual. Then one perturbation fitted to half of the prompts
and read on the others by the likeliest name, beside one fitted to shuffled answers.

    python analyses/layers.py [--layers 15 18 21] [--n 32] [--figure layers.svg]
"""

import argparse

from matplotlib import pyplot as plt

import recover as rc
from recover.evidence import fit_and_read

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--layers", type=int, nargs="+", default=[15, 18, 21])
parser.add_argument("--n", type=int, default=32, help="prompts")
parser.add_argument("--figure", default="layers.svg")
options = parser.parse_args()

model = rc.load_model("smollm2")
examples = rc.load_examples("ioi", model, n=options.n)
canvas, axes = plt.subplots(layout="constrained")
for layer in options.layers:
    sae = rc.load_sae(f"smollm2-l{layer}")
    features = rc.select_features(model, sae, sae.site, examples, top=32)
    defense = rc.Defense((rc.Clamp(sae, features, rc.Set(-5.0)),), skip_first=1)
    held = rc.EncoderOrthogonal.of(*defense.clamps)

    defended = rc.defend(model, defense, examples.prompts, examples.behavior)
    flips = examples.select(defended.valid_flips)
    target = defended.select(defended.valid_flips)
    found = rc.smallest_perturbation(target, target.zero_delta, held)
    facts = rc.certify(model, defense, flips.prompts, flips.behavior, found.delta)
    back = int((facts.shows & facts.held).sum())
    axes.scatter(facts.displacement, facts.norm, label=f"layer {layer}: {back} of {len(target)} back", alpha=0.7)

    strict = rc.defend(model, defense, examples.prompts, examples.strict)
    ids = [examples.ids[row] for row in strict.valid_flips.tolist()]
    norm = 0.6 * float(strict.residual.flatten(1).norm(dim=1).mean())
    shared = fit_and_read(strict.select(strict.valid_flips), ids, held, norm)
    print(f"layer {layer}: {back} of {len(target)} back, median norm {facts.norm.median():.1f}")
    print(f"  shared: {shared.own} of {shared.n} unseen prompts; fitted to shuffled answers: {shared.shuffled}")
axes.set(xlabel="displacement by the clamp", ylabel="smallest norm that recovers")
axes.legend()
canvas.savefig(options.figure)
