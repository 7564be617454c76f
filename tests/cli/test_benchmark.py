"""benchmark.py on a CPU: rows, checks, files, faults; and the arithmetic of what only a GPU reports."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F

from evavit import benchmarking
from evavit.benchmarking import COLUMNS, Setting, bench_op, is_done, store_rows, traffic

FEW = ["--device", "cpu", "--repeats", "2", "--warmup", "1"]
MODEL = "eva_deit_tiny:depth=1:embed_dim=32:num_heads=2"


def read(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def bench(call, tmp_path):
    """bench(*flags) → (exit code, error lines, rows of the results file)."""

    def bench(*flags):
        path = tmp_path / "new" / "results.csv"
        try:
            code, _, err = call("benchmark", *FEW, "--results-file", path, *flags)
        except SystemExit as stop:  # a wrong result
            code, err = stop.code, ""
        return code, err, read(path) if path.exists() else []

    return bench


@pytest.mark.parametrize("kind", ["op", "layer"])
def test_attention(bench, kind):
    code, err, rows = bench("--bench", kind, "--grid", "5", "8", "-b", "2", "--dim", "32", "--num-heads", "2")
    assert code == 0, err
    assert [(row["tokens"], row["backend"]) for row in rows] == [
        ("25", "plain"), ("25", "sdpa"), ("64", "plain"), ("64", "sdpa")]
    for row in rows:
        assert row["status"] == "ok" and row["width"] == "32" and row["amp_dtype"] == "float32"
        assert 0 < float(row["error"]) < 1e-5 and float(row["forward_ms"]) > 0 and float(row["ms"]) > 0
        assert row["device"] and row["torch"] == torch.__version__ and row["commit"] and row["date"]
        assert row["peak_memory_mib"] == row["forward_of_copy"] == ""  # a GPU's columns


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models(bench, dtype):
    code, err, rows = bench("--bench", "train", "infer", "--model", "eva_deit_tiny", "--img-size", "32", "-b", "2",
                            "--amp-dtype", dtype)
    assert code == 0, err
    assert [(row["bench"], row["attention"], row["backend"]) for row in rows] == [
        (kind, *contender) for kind in ("train", "infer") for contender in (("eva", "plain"), ("softmax", "sdpa"))]
    for row in rows:
        assert row["status"] == "ok" and row["img_size"] == "32" and row["torchcompile"] == "no"
        assert float(row["img_per_s"]) == pytest.approx(2e3 / float(row["ms"]), rel=1e-2, abs=0.06)
    assert rows[1]["model"] == "deit_tiny_patch16_224:class_token=False:global_pool=avg"


def test_all_contenders_are_compiled(bench, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: compiled.append((type(model).__name__, mode)) or model)
    code, err, rows = bench("--bench", "train", "--model", "eva_deit_tiny", "--img-size", "32", "-b", "2",
                            "--torchcompile", "max-autotune")
    assert code == 0, err
    assert [row["torchcompile"] for row in rows] == ["max-autotune"] * 2
    assert compiled == [("GridVisionTransformer", "max-autotune"), ("VisionTransformer", "max-autotune")]


def test_model_lists(bench, tmp_path):
    listed = tmp_path / "models.txt"
    listed.write_text(f"{MODEL}\nresnet10t\n")
    code, err, rows = bench("--bench", "infer", "--model-list", listed, "--img-size", "32", "-b", "2",
                            "--backend", "plain")
    assert code == 0, err
    assert [row["model"] for row in rows] == [MODEL]  # no softmax backend was asked for, and the ResNet has no other


def test_wildcards(call):
    code, out, _ = call("benchmark", *FEW, "--bench", "infer", "--model-list", "eva_deit_t*y,resnet10?", "-b", "1",
                        "--img-size", "32", "--backend", "plain")
    assert code == 0 and "model eva_deit_tiny " in out and "eva_deit_small" not in out


def test_wrong_result_has_no_figures(bench, monkeypatch):
    attend = benchmarking.eva_attention
    monkeypatch.setattr(benchmarking, "eva_attention", lambda q, *args, **kwargs: attend(
        q if q.dtype == torch.float64 else 1.01 * q, *args, **kwargs))
    code, _, rows = bench("--bench", "op", "--grid", "5", "-b", "2", "--dim", "32", "--num-heads", "2")
    assert code == 1
    assert "from float64" in rows[0]["status"] and float(rows[0]["error"]) > 1e-3 and rows[0]["ms"] == ""
    assert rows[1]["status"] == "ok" and rows[1]["ms"]


def test_nan_is_a_wrong_result(bench, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **kwargs: q * float("nan"))
    code, _, rows = bench("--bench", "layer", "--grid", "5", "-b", "2", "--dim", "32", "--num-heads", "2")
    assert code == 1 and [row["status"][:3] for row in rows] == ["ok", "nan"] and rows[1]["forward_ms"] == ""


def test_resume_and_replace(bench, monkeypatch):
    flags = ["--bench", "op", "--grid", "5", "-b", "2", "--dim", "32", "--num-heads", "2", "--backend", "plain"]
    monkeypatch.setenv("COMMIT", "abc")
    _, _, first = bench(*flags)
    assert [row["commit"] for row in first] == ["abc"]
    assert bench(*flags, "--resume")[2] == first
    monkeypatch.setenv("COMMIT", "def")  # the code has changed
    assert [row["commit"] for row in bench(*flags, "--resume")[2]] == ["def"]
    assert len(bench(*flags, "--dim", "16")[2]) == 2


def test_failures_are_measured_again(tmp_path):
    path = tmp_path / "results.csv"
    row = dict(bench="op", case="5x5", tokens=25, device="cpu", commit="abc", status="2e-1 from float64")
    store_rows(path, [row])
    assert not is_done(path, row)
    store_rows(path, [dict(row, status="ok")])
    assert is_done(path, row) and len(read(path)) == 1 and not is_done(path, dict(row, tokens=36))
    assert tuple(read(path)[0]) == COLUMNS


BAD = {
    "unknown model": (["--model", "eva_deit_tin"], ["eva_deit_tin", "eva_deit_tiny"]),
    "argument without a value": (["--model", "eva_deit_tiny:depth"], ["depth", "key=value"]),
    "unknown argument of the model": (["--model", "eva_deit_tiny:windows=3"], ["windows"]),
    "images smaller than a patch": (["--model", "eva_deit_tiny", "--img-size", "8"], ["eva_deit_tiny"]),
    "no model of that pattern": (["--model-list", "eva_resnet*"], ["eva_resnet*"]),
    "no such device": (["--device", "gpu"], ["gpu", "cuda"]),
    "device that is not measured": (["--device", "meta"], ["meta", "cuda"]),
    "device that is not there": (["--device", "cuda:64"], ["cuda:64", "CUDA devices"]),
    "kernels on a CPU": (["--bench", "op", "--backend", "triton"], ["triton", "CUDA"]),
    "heads that do not divide": (["--bench", "op", "--num-heads", "5"], ["5", "192"]),
    "no batch": (["-b", "0"], ["-b", "0"]),
    "no such bench": (["--bench", "speed"], ["speed", "infer"]),
    "unknown flag": (["--batches", "3"], ["--batches"]),
    "resume of nothing": (["--resume"], ["--results-file"]),
}


@pytest.mark.parametrize("fault", BAD)
def test_refuses(fault, call):
    flags, words = BAD[fault]
    code, _, err = call("benchmark", *FEW, "-b", "1", *flags)
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    assert all(word in err for word in words), err


def test_foreign_results_file(call, tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("model,top1\na,1\n")
    code, _, err = call("benchmark", *FEW, "--bench", "op", "--grid", "3", "-b", "1", "--results-file", path)
    assert code == 2 and str(path) in err and path.read_text() == "model,top1\na,1\n"


def test_traffic_is_the_issue_of_bandwidth():
    """128 images of 784 tokens, 192 channels: 154 MB for q, k, v and o in half precision, twice that backward."""
    forward, backward = traffic(128, 784, 192, torch.bfloat16)
    assert forward == 154_140_672 and backward == 2 * forward
    assert traffic(128, 784, 192, torch.float32)[0] == 2 * forward


def test_fractions_of_a_copy():
    setting = Setting(torch.device("cpu"), torch.float32, ("plain",), repeats=2, warmup=0, copy_gb_per_s=10.)
    row, = bench_op(setting, batch=2, side=5, heads=2, head_dim=16)
    forward, backward = traffic(2, 25, 32, torch.float32)
    assert row["forward_of_copy"] == pytest.approx(forward / (row["forward_ms"] * 1e-3) / 10e9, abs=1e-4)
    assert row["backward_of_copy"] == pytest.approx(
        backward / ((row["ms"] - row["forward_ms"]) * 1e-3) / 10e9, abs=1e-4)
    assert row["copy_gb_per_s"] == 10.


def test_reference_in_blocks(monkeypatch):
    """The float64 reference of softmax, whatever the number of queries it takes at a time."""
    qkv = [torch.randn(2, 1, 9, 3, dtype=torch.double, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(benchmarking._Exact.apply, qkv)
    torch.testing.assert_close(benchmarking._Exact.apply(*qkv), F.scaled_dot_product_attention(*qkv))
    whole = torch.autograd.grad(benchmarking._Exact.apply(*qkv).square().sum(), qkv)
    monkeypatch.setattr(benchmarking, "BLOCK_ELEMENTS", 2 * 1 * 9 * 2)
    blocks = torch.autograd.grad(benchmarking._Exact.apply(*qkv).square().sum(), qkv)
    assert len(list(benchmarking._Exact._weights(*qkv[:2]))) == 5
    torch.testing.assert_close(blocks, whole)


def test_worst_error():
    a, b = torch.ones(3, dtype=torch.double), torch.tensor([1., 1., 2.], dtype=torch.double)
    assert benchmarking._worst_error([a, a], [a, b]) == pytest.approx(1 / math.sqrt(6))
    assert math.isnan(benchmarking._worst_error([a, a * float("nan")], [b, b]))


def test_batches_hold_one_number_of_tokens():
    """At least 28 × 28: within a third of one another (a batch is whole images)."""
    tokens = [side ** 2 * batch for side, batch in benchmarking.GRIDS.items() if side >= 28]
    assert all(100_000 <= count <= 131_072 for count in tokens)
    assert {14: 256, 28: 128, 56: 32, 112: 8}.items() <= benchmarking.GRIDS.items() and 256 in benchmarking.GRIDS
