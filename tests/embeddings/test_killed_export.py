"""A killed export resumes to the same bytes, in one process and in two."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch

from tests.embeddings.export_program import environment, export_to, program, undisturbed, wait_for


def test_killed_export_resumes_to_the_same_bytes(tmp_path):
    resume, out = tmp_path / "resume", tmp_path / "killed.parquet"
    process = subprocess.Popen(program(resume, out), env=environment())
    wait_for(lambda: len(list(resume.glob("*.safetensors"))) >= 43, process)  # of 80: in the middle of the texts
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    finished = sorted(resume.glob("*.safetensors"))
    assert 43 <= len(finished) < 80
    finished[5].unlink()  # as if it had been killed among the images, too
    num_threads = torch.get_num_threads()
    try:
        export_to(resume, out)
        export_to(tmp_path / "fresh", tmp_path / "undisturbed.parquet")
    finally:
        torch.set_num_threads(num_threads)
    assert len(list(resume.glob("*.safetensors"))) == 80
    assert out.read_bytes() == (tmp_path / "undisturbed.parquet").read_bytes()
    assert pq.read_metadata(out).num_rows == 160


@pytest.mark.parametrize("victim", [0, 1])
def test_two_processes_one_killed(tmp_path, victim):
    """The other says so in one line; the next launch takes what is finished and ends with the bytes of one process."""
    resume, out = tmp_path / "resume", tmp_path / "shared.parquet"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    pair = [
        subprocess.Popen(program(resume, out), env=environment(RANK=str(index), **address), stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    try:
        wait_for(lambda: len(list(resume.glob("*.safetensors"))) >= 10, pair[victim])
        pair[victim].send_signal(signal.SIGKILL)
        said = pair[1 - victim].communicate(timeout=120)[1].strip().splitlines()[-1]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert pair[1 - victim].returncode == 1
    assert f"process {1 - victim} of 2: another process of this launch is gone" in said
    assert "run the same command again" in said
    assert not out.exists()
    assert 10 <= len(list(resume.glob("*.safetensors"))) < 80
    if victim == 1:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--standalone",
            *program(resume, out)[1:],
        ]
        subprocess.run(launch, env=environment(), check=True, capture_output=True, timeout=300)
        assert out.read_bytes() == undisturbed(tmp_path)
