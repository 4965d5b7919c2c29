"""FSDP2: codes are sharded, training is the same, and the state can be saved and loaded."""

from __future__ import annotations

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import nybble as nb
import nybble.hf
from processes import spawn
from strategies import same_bits
from test_ddp import STEPS, half, mean
from tiny import RENAMED, adapted, batch, logits, quantized, train

pytestmark = [RENAMED, pytest.mark.timeout(240)]
KINDS = ["nf4_dq", "int8"]
ODD = [(5, 7, "nf4"), (1, 1, "int4"), (3, 64, "nf4"), (7, 33, "int8")]


def prepared(kind, dtype=torch.float32):
    cast = torch.float32 if dtype == torch.float32 else None
    return adapted(nybble.hf.prepare_for_qlora(quantized(kind, dtype), dtype=cast))


def sharded(model, **options):
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def refusal(call):
    try:
        call()
    except (nb.Error, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def work(rank, directory):
    return {
        "odd": odd_sizes(rank),
        "bf16": [in_bfloat16(rank, policy) for policy in (False, True)],
        **{kind: learned(rank, kind, directory / kind) for kind in KINDS},
    }


def learned(rank, kind, directory):
    model = sharded(prepared(kind))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    held = {
        "codes": tuple(layer.base_layer.weight.to_local().shape),
        "scales": layer.base_layer.absmax.numel(),
        "adapter": tuple(layer.lora_A["default"].weight.to_local().shape),
    }
    losses = mean(train(model, half(rank), STEPS))
    refusals = [
        refusal(layer.base_layer.dequantize),
        refusal(lambda: nybble.hf.merge(model, to="bf16")),
        refusal(lambda: model.load_state_dict(prepared(kind).state_dict())),
    ]
    result = {"held": held, "losses": losses, "logits": logits(model), "refusals": refusals}

    nybble.hf.save_adapter(model, directory / "adapter")
    whole = nybble.hf.full_state_dict(model)
    result["state"] = {name: tensor.clone() for name, tensor in whole.items()}

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(model, options=options)
    again = sharded(prepared(kind))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, gathered, options=options)
    result["resumed"] = logits(again)

    dcp.save(model.state_dict(), checkpoint_id=str(directory / "checkpoint"))
    again = sharded(prepared(kind))
    state = again.state_dict()
    dcp.load(state, checkpoint_id=str(directory / "checkpoint"))
    again.load_state_dict(state)
    result["reloaded"] = logits(again)
    return result


def in_bfloat16(rank, policy):
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if policy else {}
    model = sharded(prepared("nf4", torch.bfloat16), **options)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    return dtypes, mean(train(model, half(rank), STEPS))


def odd_sizes(rank):
    torch.manual_seed(0)
    found = []
    for out_features, in_features, format in ODD:
        layer = nn.Sequential(nn.Linear(in_features, out_features))
        nb.quantize_model(layer, format)
        x = torch.randn(4, in_features, requires_grad=True)
        expected = layer(x)
        (wanted,) = torch.autograd.grad(expected.sum(), x)
        bits = layer.state_dict()
        fully_shard(layer)
        got = layer(x)
        got.sum().backward()
        full = nybble.hf.full_state_dict(layer)
        same = rank != 0 or all(same_bits(full[name], bits[name]) for name in bits)
        found.append((torch.equal(got, expected), torch.equal(x.grad, wanted), same))
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the processes write."""
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def found(directory):
    """What each process has found; they are started once."""
    return spawn(work, directory, directory)


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp2_learns_what_one_process_learns_and_saves_it(kind, found, directory):
    results = [process[kind] for process in found]
    model = prepared(kind)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = train(model, batch(), STEPS)
    rows = (128, 256) if kind == "int8" else (16384, 1)  # half of 256 rows, half of the bytes
    for result in results:
        assert result["losses"] == pytest.approx(expected, rel=1e-4)
        assert result["held"]["codes"] == rows
        assert result["held"]["scales"] == (256 if kind == "int8" else 1024)
        assert result["held"]["adapter"] == (4, 256)
        decode, merge, load = result["refusals"]
        assert decode.startswith("DeviceError: this weight is sharded over processes")
        assert merge.startswith("DeviceError: 'model.layers.0.self_attn.q_proj' is sharded")
        assert "Load other checkpoints before fully_shard" in load
        assert torch.equal(result["logits"], results[0]["logits"])
        assert torch.equal(result["resumed"], result["logits"])
        assert torch.equal(result["reloaded"], result["logits"])

    state, nothing = (result["state"] for result in results)
    assert nothing == {}
    assert state.keys() == plain.keys()
    frozen = [name for name in plain if "lora_" not in name]
    assert any("quant_state" in name or "SCB" in name for name in frozen)
    assert all(same_bits(state[name], plain[name]) for name in frozen)

    loaded = nybble.hf.load_adapter(
        nybble.hf.prepare_for_qlora(quantized(kind)), directory / kind / "adapter"
    )
    assert torch.equal(logits(loaded), results[0]["logits"])
    fresh = prepared(kind)
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh.eval()), results[0]["logits"])


@pytest.mark.parametrize("policy", [False, True])
def test_a_bfloat16_model_with_float32_adapters_is_sharded_with_and_without_a_policy(policy, found):
    expected = train(prepared("nf4", torch.bfloat16), batch(), STEPS)
    for process in found:
        dtypes, losses = process["bf16"][policy]
        assert dtypes == {torch.float32}
        # the policy computes the adapter in bfloat16 too, which rounds at 2^-8
        assert losses == pytest.approx(expected, rel=2**-8)


def test_sizes_that_do_not_divide_are_sharded_too(found):
    for process in found:
        assert process["odd"] == [(True, True, True)] * len(ODD)


def test_a_state_under_plain_names_is_checked():
    layer = nb.nn.Linear4bit(64, 16)
    plain = {name: getattr(layer, name) for name in ("weight", "absmax", "bias")}
    other = nb.nn.Linear4bit.from_linear(nn.Linear(64, 16), "nf4")
    other.load_state_dict(plain)
    assert same_bits(other.weight.data, layer.weight.data)
    with pytest.raises(
        RuntimeError, match=r"'weight' should be torch\.uint8, found torch\.float32"
    ):
        layer.load_state_dict({**plain, "weight": torch.zeros(512, 1)})
    with pytest.raises(RuntimeError, match=r"'nested_absmax' should be torch\.float32, found no"):
        nb.nn.Linear4bit(64, 16, nested=True).load_state_dict(
            {**plain, "absmax": torch.zeros(16, dtype=torch.uint8)}
        )
