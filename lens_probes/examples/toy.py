"""A worked example of attention with four dimensions: what `it` looks for in `cat` and `mat`.

"The cat sat on the mat because it was tired." The four dimensions are animacy, number, syntactic role and content; the
vectors of three tokens are given, not learned. Four functions compute one head:

    raw[query, key] = q . k          score = raw / sqrt(d_head)
    weight = softmax over keys       output[query] = sum over keys of weight v

    >>> weight = weigh(score(project(Q, K)))
    >>> [round(float(each), 4) for each in weight[TOKENS.index("it")]]
    [0.4446, 0.304, 0.2514]

So `it` attends more to `cat` than to `mat`, 0.44 to 0.25. The raw products, 2.11 and 0.97, suggest a larger difference.
cat and mat have the same fourth value, so that dimension, which should say what kind of thing they are, does not.

Source: Henry Dashwood, "How to Think About Self-Attention Intuitively"; the post stops at the raw products.
"""

import torch
from jaxtyping import Float
from torch import Tensor

TOKENS = ("cat", "it", "mat")
DIMENSIONS = ("animacy", "number", "role", "content")
Q = torch.tensor([[0.1, 0.2, 0.3, 0.1], [0.9, 0.8, 0.7, 0.1], [0.1, 0.1, 0.2, 0.1]])
K = torch.tensor([[0.9, 0.9, 0.8, 0.2], [0.3, 0.9, 0.5, 0.1], [0.1, 0.9, 0.2, 0.2]])
V = torch.tensor([[0.7, 0.6, 0.4, 0.9], [0.1, 0.5, 0.3, 0.1], [0.1, 0.6, 0.3, 0.9]])


def project(q: Float[Tensor, "query d_head"], k: Float[Tensor, "key d_head"]) -> Float[Tensor, "query key d_head"]:
    """What each dimension adds to the product of a query and a key; the sum over dimensions is `raw`.

    >>> round(float(project(Q, K).sum(-1)[1, 0]), 2)
    2.11
    """
    return q[:, None] * k


def score(terms: Float[Tensor, "query key d_head"]) -> Float[Tensor, "query key"]:
    """The sum over dimensions, divided by the square root of their number."""
    return terms.sum(-1) / terms.shape[-1] ** 0.5


def weigh(scores: Float[Tensor, "query key"]) -> Float[Tensor, "query key"]:
    """The attention weights of each query, which sum to 1."""
    return scores.softmax(-1)


def mix(weights: Float[Tensor, "query key"], v: Float[Tensor, "key d_head"]) -> Float[Tensor, "query d_head"]:
    """The output of each query: the sum of the keys' values, weighted by attention.

    >>> mix(weigh(score(project(Q, K))), V)[1, 3].item().__round__(4)
    0.6568
    """
    return weights @ v
