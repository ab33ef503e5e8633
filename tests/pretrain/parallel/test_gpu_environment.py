"""What a process on a GPU sets before CUDA starts, and how it joins the others."""

from __future__ import annotations

import datetime
import os
import tempfile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.parallel import gpu_environment, processes
from pretrain.parallel.gpu_environment import gloo_interface, set_gpu_environment

NAMES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def settings():
    set_gpu_environment()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_memory_grows_and_kernels_are_kept_on_the_local_disk(tmp_path):
    found = settings()
    assert found.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    (folder,) = tmp_path.iterdir()
    assert found == {
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in found:
        del os.environ[name]
    assert settings().items() >= found.items()  # the next run finds what this one compiled


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_is_set_stays(name, tmp_path, monkeypatch):
    given = {name: "max_split_size_mb:64", "TRITON_CACHE_DIR": "/a", "TORCHINDUCTOR_CACHE_DIR": ""}
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    assert settings() == given
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", ["writable by all", "a link", "a file"])
def test_kernels_are_not_read_from_what_others_may_have_written(make, tmp_path):
    folder = tmp_path / f"pretrain-kernels-{os.getuid()}"
    if make == "a file":
        folder.touch()
    elif make == "a link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    assert settings() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("", None),
        ("eth", None),  # two begin so
        ("eth0", "eth0"),
        ("=eth", None),
        ("=eth1", "eth1"),
        ("=eth1:1234", "eth1"),
        ("=eth0,eth1", None),
        ("=eth0,wlan0", "eth0"),  # the second is not there
        ("ib,docker", None),
        ("ib,wlan", "ib0"),
        ("lo", "lo"),
        ("^docker0", None),
        ("^docker,ib,eth1", "eth0"),
        ("^=docker0,ib0,eth0", "eth1"),
        ("^", None),
        ("=", None),
    ],
)
def test_gloo_takes_the_only_interface_that_nccl_may(wanted, expected, monkeypatch):
    interfaces = ["lo", "eth0", "eth1", "ib0", "docker0"]
    assert gloo_interface(wanted, interfaces) == expected
    monkeypatch.setattr("socket.if_nameindex", lambda: list(enumerate(interfaces, 1)))
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", wanted)
    assert settings().get("GLOO_SOCKET_IFNAME") == expected
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert settings()["GLOO_SOCKET_IFNAME"] == "eth7"


def test_the_environment_is_set_where_a_gpu_is_first_asked_for(monkeypatch):
    gpu_environment.prepare_gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.local_device() == torch.device("cpu")
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert processes.local_device() == torch.device("cuda", 3)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    gpu_environment.prepare_gpu.cache_clear()


@pytest.mark.parametrize("torchrun", [False, True])
def test_nccl_is_told_its_device(torchrun, monkeypatch):
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda **options: given.append(options))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("RANK", raising=False)
    if torchrun:
        monkeypatch.setenv("RANK", "0")
    device, timeout = torch.device("cuda", 1), datetime.timedelta(minutes=3)
    processes._connect(device, timeout)
    processes._connect(torch.device("cpu"), timeout)
    nccl, gloo = given
    assert (nccl["backend"], nccl["device_id"], nccl["timeout"]) == ("nccl", device, timeout)
    assert (gloo["backend"], "device_id" in gloo) == ("gloo", False)
    if torchrun:
        assert not {"store", "rank", "world_size"} & (nccl.keys() | gloo.keys())
        return
    assert (nccl["rank"], nccl["world_size"]) == (0, 1)
    store: Any = nccl["store"]
    store.set("a key", "a value")
    assert store.clone().get("a key") == b"a value"
    assert isinstance(store, dist.TCPStore)


@pytest.mark.usefixtures("processes")
def test_groups_are_not_split_from_that_of_all(monkeypatch):
    """Of a world that knows its device torch splits every group, also of gloo."""
    from megatron.core import parallel_state

    world: Any = dist.group.WORLD
    world.bound_device_id = torch.device("cuda", 0)
    seen: list[Any] = []
    monkeypatch.setattr(processes, "groups", lambda: None)
    monkeypatch.setattr(
        parallel_state,
        "initialize_model_parallel",
        lambda **_: seen.append(SimpleNamespace(device=world.bound_device_id)),
    )
    assert processes.start_processes()
    assert [at.device for at in seen] == [None]
