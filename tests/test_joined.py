"""Joined products are the layers' own, also after weights have moved."""

import pytest
import torch

from diffusion_lm import DiffusionLM, LMConfig
from speed.joined import join


@pytest.mark.long
@pytest.mark.parametrize("groups", [{}, {"n_kv_heads": 2, "qk_norm": True}], ids=str)
def test_compiled_with_joined_products_gives_the_same_hidden_states(groups):
    torch.manual_seed(0)
    config = LMConfig(width=16, n_layers=2, n_heads=4, ffn=24, vocab=40, **groups)
    lm = DiffusionLM(config).eval().requires_grad_(False)
    x = torch.randn(2, 7, 16)
    rows = torch.arange(3)
    plain = lm(x, output_rows=rows)
    names = list(lm.state_dict())

    products = []

    def count(graph, inputs):
        products.append(sum("linear" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    apart = torch.compile(lm, backend=count, fullgraph=True)(x, output_rows=rows)
    join(lm)
    assert torch.equal(lm(x, output_rows=rows), plain) and list(lm.state_dict()) == names
    together = torch.compile(lm, backend=count, fullgraph=True)(x, output_rows=rows)
    assert torch.allclose(apart, plain) and torch.allclose(together, plain, atol=1e-6)
    assert products[0] == 14 and products[1] == 14 - 2 - 2  # q-k-v of block 1, gate-up of both

    # New numbers and a new dtype.
    lm.double()
    lm.load_state_dict({name: 2 * weight for name, weight in lm.state_dict().items()})
    join(lm)
    doubled = torch.compile(lm, backend=count, fullgraph=True)(x.double(), output_rows=rows)
    assert torch.allclose(doubled, lm(x.double(), output_rows=rows))
    assert lm.blocks[0].attn.joined.dtype == torch.float64
