"""Experts with quantized weights compute what the original module does with decoded ones."""

from __future__ import annotations

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

import nybble as nb
from nybble.nn import Experts4bit, Experts8bit, Linear4bit, Linear8bit
from strategies import SPEC, seeds, settings_of

transformers = pytest.importorskip("transformers", minversion="5.23")  # has all variants

HIDDEN, INNER, EXPERTS = 64, 96, 5


def mixtral():
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return MixtralExperts, transformers.MixtralConfig(num_local_experts=EXPERTS)


def gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return GptOssExperts, transformers.GptOssConfig(num_local_experts=EXPERTS)


def aria():
    from transformers.models.aria.modeling_aria import AriaExperts

    return AriaExperts, transformers.AriaTextConfig(moe_num_experts=EXPERTS)


def nemotron():
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = transformers.NemotronHConfig(
        n_routed_experts=EXPERTS, moe_intermediate_size=INNER, moe_latent_size=None
    )
    return NemotronHExperts, config


def muse_spark():
    from transformers.models.muse_spark import modeling_muse_spark as muse

    config = muse.MuseSparkTextConfig(
        num_local_experts=EXPERTS, moe_intermediate_size=INNER, moe_hidden_size=HIDDEN
    )
    return muse.MuseSparkExperts, config


VARIANTS = {
    "concatenated": mixtral,
    "interleaved, transposed, biased": gpt_oss,
    "transposed": aria,
    "without a gate": nemotron,
    "with a norm behind": muse_spark,
}


def dense_experts(variant="concatenated", seed=0, dtype=torch.float32, device=None):
    cls, config = VARIANTS[variant]()
    config.hidden_size, config.intermediate_size = HIDDEN, INNER
    config._experts_implementation = "eager"
    with torch.device(device or "cpu"):
        experts = cls(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            if device is None:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return experts.to(dtype).eval()


def routed(tokens, k, seed, reachable=EXPERTS):
    """Hidden states, k different experts for each token, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    scores = torch.rand(tokens, reachable, generator=generator)
    weights, index = scores.topk(k, dim=-1)
    return x, index, weights


def assert_same_sum(got, want):
    """Sums of products in float32, in another order: far below the size of the result."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_every_layout_of_transformers_gives_what_its_own_forward_gives(variant, format):
    cls = Experts4bit if SPEC[format]["bits"] == 4 else Experts8bit
    experts = cls.from_experts(dense_experts(variant), format)
    x, index, weights = routed(17, 2, seed=1)
    want = experts.to_experts()(x, index, weights)
    assert want.abs().max() > 0.1
    assert_same_sum(experts(x, index, weights), want)


@given(
    how=settings_of(),
    variant=st.sampled_from(list(VARIANTS)),
    tokens=st.integers(0, 12),
    k=st.integers(1, 3),
    reachable=st.integers(3, EXPERTS),
    seed=seeds,
)
def test_any_routing_gives_what_decoded_weights_give(how, variant, tokens, k, reachable, seed):
    if how["format"] == "dynamic8u":  # holds no negative values
        how["format"] = "dynamic8"
    cls = Experts4bit if SPEC[how["format"]]["bits"] == 4 else Experts8bit
    experts = cls.from_experts(dense_experts(variant, seed), **how)
    x, index, weights = routed(tokens, k, seed, reachable)
    got = experts(x, index, weights)
    assert got.shape == (tokens, HIDDEN)
    assert_same_sum(got, experts.to_experts()(x, index, weights))


def test_gradients_reach_the_states_and_the_weights_of_the_router():
    experts = Experts4bit.from_experts(dense_experts(), "nf4")
    x, index, weights = routed(9, 2, seed=2)
    x.requires_grad_()
    weights.requires_grad_()
    got = torch.autograd.grad(experts(x, index, weights).square().sum(), (x, weights))
    want = torch.autograd.grad(experts.to_experts()(x, index, weights).square().sum(), (x, weights))
    assert want[0].abs().max() > 0.1
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_only_experts_that_were_chosen_are_computed():
    experts = Experts4bit.from_experts(dense_experts(), "nf4")
    asked = []
    for name, _, _, layer in experts.projections():
        layer.register_forward_hook(lambda *_, name=name: asked.append(name))
    x, _, _ = routed(3, 1, seed=3)
    index = torch.tensor([[1, 3], [3, EXPERTS], [EXPERTS + 2, 1]])  # numbers beyond mean nobody
    weights = torch.ones(3, 2)
    got = experts(x, index, weights)
    assert {name.partition(".")[0] for name in asked} == {"1", "3"}
    assert len(asked) == 2 * 3
    alone = experts(x[2:], index[2:, 1:], weights[2:, 1:])
    assert_same_sum(got[2:], alone)


def test_weights_are_those_of_single_matrices_and_the_dtype_is_kept():
    dense = dense_experts("interleaved, transposed, biased", dtype=torch.bfloat16)
    experts = Experts4bit.from_experts(dense, "nf4", nested=True)
    gate_up = dense.gate_up_proj[2]
    want = nb.quantize(gate_up[:, 1::2].T.contiguous(), "nf4", nested=True)
    layer = experts.projection(2, "up")
    assert torch.equal(layer.qtensor.packed, want.packed)
    assert torch.equal(layer.absmax, want.absmax)
    assert torch.equal(layer.bias, dense.gate_up_proj_bias[2, 1::2])
    back = experts.to_experts()
    assert type(back) is type(dense)
    assert back.down_proj.dtype == torch.bfloat16
    assert torch.equal(back.gate_up_proj[2, :, 1::2].T, want.dequantize())
    assert torch.equal(back.down_proj_bias, dense.down_proj_bias)
    assert dense.gate_up_proj is not None  # the original is not changed


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_dict_has_the_names_of_single_experts_and_fills_a_meta_module(variant):
    experts = Experts4bit.from_experts(dense_experts(variant), "nf4", nested=True)
    state = experts.state_dict()
    assert "4.down_proj.weight.absmax" in state
    assert not any(name.startswith(("gate_up", "up_proj", "down_proj", "act")) for name in state)
    meta = Experts4bit.from_experts(dense_experts(variant, device="meta"), "nf4", nested=True)
    layer = meta.projection(0, "down")
    assert layer.weight.device.type == "meta"
    assert layer.weight.shape == experts.projection(0, "down").weight.shape
    meta.load_state_dict(state, assign=True)
    x, index, weights = routed(5, 2, seed=4)
    assert torch.equal(meta(x, index, weights), experts(x, index, weights))


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_and_pickles_compute_the_same(variant):
    experts = Experts4bit.from_experts(dense_experts(variant), "nf4")
    x, index, weights = routed(5, 2, seed=5)
    want = experts(x, index, weights)
    for twin in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(twin(x, index, weights), want)
        assert type(twin.to_experts()) is type(experts.to_experts())


def test_half_leaves_the_codes_and_scales_alone():
    experts = Experts4bit.from_experts(dense_experts("with a norm behind"), "nf4").half()
    layer = experts.projection(1, "gate")
    assert layer.weight.dtype == torch.uint8
    assert layer.absmax.dtype == torch.float32
    assert experts.post_expert_norm.weight.dtype == torch.float16
    x, index, weights = routed(5, 2, seed=6)
    assert experts(x.half(), index, weights).dtype == torch.float16


def test_layers_can_be_named_as_files_name_them():
    experts = Experts4bit.from_experts(dense_experts(), "nf4", names=("w1", "w3", "w2"))
    assert list(experts.names.items()) == [("gate", "w1"), ("up", "w3"), ("down", "w2")]
    assert isinstance(experts.get_submodule("3.w2"), Linear4bit)
    with pytest.raises(nb.FormatError, match="3 different names, for gate, up, down"):
        Experts4bit.from_experts(dense_experts(), "nf4", names=("w1", "w2"))


def test_the_class_says_how_many_bits():
    with pytest.raises(nb.FormatError, match="use the 8-bit class"):
        Experts4bit.from_experts(dense_experts(), "int8")
    experts = Experts8bit.from_experts(dense_experts(), "int8")
    assert isinstance(experts.projection(0, "up"), Linear8bit)


def test_a_module_that_does_not_say_how_its_experts_lie_is_refused():
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    config = transformers.Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=2
    )
    with pytest.raises(nb.FormatError, match=r"Llama4TextExperts does not say.*has_gate"):
        Experts4bit.from_experts(Llama4TextExperts(config), "nf4")
    lying = dense_experts()
    lying.is_transposed = True
    with pytest.raises(nb.FormatError, match="its flags say"):
        Experts4bit.from_experts(lying, "nf4")


def test_an_adapter_around_a_layer_is_used_and_keeps_dequantizing_from_losing_it():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1

    experts = Experts4bit.from_experts(dense_experts(), "nf4")
    x, _, _ = routed(4, 1, seed=7)
    index, weights = torch.full((4, 1), 2), torch.ones(4, 1)
    before = experts(x, index, weights)
    experts.set_submodule("2.down_proj", Adapter(experts.projection(2, "down")))
    assert_same_sum(experts(x, index, weights), before + 1)
    with pytest.raises(nb.FormatError, match=r"'2\.down_proj' is a Adapter"):
        experts.to_experts()
