"""Sparse autoencoders: one form for every linear-encoder SAE, loading by name, decomposition, and fit to a model.

Read `sae` first: it defines the form `features = activation(x @ W_enc + b_enc)` and folds sae_lens SAEs into it.
`activations` holds the activation functions, `names` loads SAEs by name, `decomposition` splits a residual into
reconstruction and error, and `fit` measures how well an SAE describes a model's residuals.
"""

from recover.saes.activations import AbsTopK, Activation, Gated, JumpReLU, ReLU, TopK
from recover.saes.decomposition import Decomposition, decompose, recompose
from recover.saes.fit import Fit, measure_fit
from recover.saes.names import load_sae, shipped_saes
from recover.saes.sae import SAE, from_sae_lens, load_sae_folder

__all__ = [
    "SAE",
    "AbsTopK",
    "Activation",
    "Decomposition",
    "Fit",
    "Gated",
    "JumpReLU",
    "ReLU",
    "TopK",
    "decompose",
    "from_sae_lens",
    "load_sae",
    "load_sae_folder",
    "measure_fit",
    "recompose",
    "shipped_saes",
]
