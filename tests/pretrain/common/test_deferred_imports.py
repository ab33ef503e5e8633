"""Imports that wait until what they name is first used."""

import builtins
import importlib
import sys
import types

import pytest
import torch

from pretrain.common.deferred_imports import deferred_imports
from tests.helpers.processes import run_interpreter

DEFINES = """
class Shape: sides = 4
class Square(Shape): pass
def area(side): return side ** 2
"""
IMPORTS = """
from typing import Optional
from shapes.defined import Shape, Square as Quadrat, area
from . import late
from .late import VALUE
def sides(shape: Optional[Shape], other: "Quadrat | None" = None) -> int | Shape: ...
def is_shape(value): return isinstance(value, (int, Shape)) and not issubclass(int, Shape)
def found(): return Shape
"""


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    folder = tmp_path / "shapes"
    folder.mkdir()
    for name, text in {
        "__init__": "",
        "defined": DEFINES,
        "late": "VALUE = object()",
        "user": IMPORTS,
    }.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "shapes"]:
        del sys.modules[name]


def test_a_module_is_imported_when_something_of_it_is_used(shapes):
    ordinary = builtins.__import__
    names = ("shapes.defined", "shapes.late")
    with deferred_imports(["shapes"], {name: name for name in names}):
        user = importlib.import_module("shapes.user")
    assert builtins.__import__ is ordinary
    assert not sys.modules.keys() & set(names)
    assert user.is_shape(3)
    assert not user.is_shape("3")  # which imports nothing: there is no Shape yet
    assert "shapes.defined" not in sys.modules
    assert user.area(3) == 9
    defined = importlib.import_module("shapes.defined")
    assert user.is_shape(defined.Square())
    assert user.Shape is user.found() is defined.Shape  # since it was used
    assert user.Quadrat.sides == 4
    assert user.Quadrat is defined.Square

    assert issubclass(types.new_class("Own", (user.Quadrat,)), defined.Square)
    assert user.late.VALUE is sys.modules["shapes.late"].VALUE


def test_classes_derive_from_the_real_class(shapes):
    with deferred_imports(["shapes"], {"shapes.defined": "shapes.defined"}):
        user = importlib.import_module("shapes.user")

    own = types.new_class("Own", (user.Shape,))
    assert own.__mro__[1] is sys.modules["shapes.defined"].Shape


def test_others_and_what_is_there_are_left_alone(shapes):
    with deferred_imports(["another"], {"shapes.defined": "shapes.defined"}):
        user = importlib.import_module("shapes.user")
    assert user.Shape is sys.modules["shapes.defined"].Shape
    del sys.modules["shapes.user"]
    with deferred_imports(["shapes"], {"shapes.defined": "shapes.defined"}):
        again = importlib.import_module("shapes.user")
    assert again.Shape is user.Shape


def test_threads_may_overlap(shapes):
    ordinary = builtins.__import__
    first, second = deferred_imports(["a"], {}), deferred_imports(["b"], {})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert builtins.__import__ is not ordinary
    second.__exit__(None, None, None)
    assert builtins.__import__ is ordinary


CHECKPOINTS = """
import sys
from pretrain.optim.backends import megatron
from pretrain.checkpoint.storage import storage
from pretrain.parallel.pipeline import _schedules
storage()
_schedules()
heavy = ("sympy", "torch.distributed.tensor", "torch.distributed.fsdp", "setuptools", "triton",
         "megatron.core.inference.contexts")
print([module for module in heavy if module in sys.modules])

import tempfile
import torch
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, distribute_tensor, Replicate, Shard
from megatron.core.distributed import FullyShardedDataParallel, finalize_model_grads
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core import InferenceParams, utils
mesh = dist.init_device_mesh("cpu", (1,))
values = torch.arange(6.0).view(2, 3)
folder = tempfile.mkdtemp()
made = distribute_tensor(values, mesh, [Shard(0)])
dcp.save({"of_mesh": made, "plain": values}, checkpoint_id=folder, no_dist=True)
state = {"of_mesh": distribute_tensor(torch.zeros(2, 3), mesh, [Shard(0)]),
         "plain": torch.zeros(2, 3)}
dcp.load(state, checkpoint_id=folder, no_dist=True)
print(type(state["of_mesh"]) is DTensor, state["of_mesh"].full_tensor().equal(values),
      state["plain"].equal(values))
print(type(utils.to_local_if_dtensor(made)) is torch.Tensor, utils.DTensor is DTensor)
print(isinstance(torch.nn.Linear(1, 1), FullyShardedDataParallel),
      InferenceParams(1, 2).max_sequence_length)
from megatron.core.transformer.fsdp_dtensor_checkpoint import DTensor as deferred_no_more
print(deferred_no_more is DTensor, mcore_fsdp_adapter.FullyShardedDataParallel.__module__)
"""


def test_later_users_of_torch_and_megatron_have_all_of_both():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, text = run_interpreter("-W", "ignore", "-c", CHECKPOINTS)
    assert (status, text.splitlines()[-5:]) == (
        0,
        [
            "[]",
            "True True True",
            "True True",
            "False 2",
            "True megatron.core.distributed.fsdp.mcore_fsdp_adapter",
        ],
    ), text


HELP = """
import contextlib, io, runpy, sys
for command in ("pretrain", "launch", "evals", "data_prep"):
    sys.argv = [command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        runpy.run_module(command, run_name="__main__")
    print(command, [name for name in ("torch", "numpy", "pandas") if name in sys.modules])
"""


def test_help_waits_for_no_library():
    status, text = run_interpreter("-c", HELP)
    assert (status, text) == (0, "pretrain []\nlaunch []\nevals []\ndata_prep []\n")
