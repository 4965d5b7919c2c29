"""Two processes with half a batch each learn what one learns with the whole."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import nybble.hf
from processes import WORLD, spawn
from tiny import RENAMED, adapted, batch, codes, quantized, train

pytestmark = [RENAMED, pytest.mark.timeout(240)]
STEPS = 4
KINDS = ["nf4_dq", "int8"]


def half(rank):
    return batch().chunk(WORLD)[rank]


def mean(values):
    """The mean over processes: the loss of the whole batch, since the halves are equally long."""
    total = torch.tensor(values)
    dist.all_reduce(total)
    return (total / WORLD).tolist()


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def work(rank):
    return {kind: learned(rank, kind) for kind in KINDS}


def learned(rank, kind):
    model = adapted(nybble.hf.prepare_for_qlora(quantized(kind)))
    before = codes(model)
    losses = mean(train(DistributedDataParallel(model), half(rank), STEPS))
    same = all(torch.equal(before[name], tensor) for name, tensor in codes(model).items())
    return losses, adapters(model), same


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process has learned; they are started once."""
    return spawn(work, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("kind", KINDS)
def test_ddp_learns_what_one_process_learns(kind, results):
    model = adapted(nybble.hf.prepare_for_qlora(quantized(kind)))
    expected = train(model, batch(), STEPS)
    for result in results:
        losses, weights, codes_are_the_same = result[kind]
        # The sums are the same but for their order. Adam divides by the size of a gradient, so
        # rounding of the smallest gradients shows in the steps.
        assert losses == pytest.approx(expected, rel=1e-4)
        assert codes_are_the_same
        for name, tensor in adapters(model).items():
            assert torch.equal(weights[name], results[0][kind][1][name])
            assert (weights[name] - tensor).norm() < 0.01 * tensor.norm(), name
