"""Trains TopK SAEs in plain dense PyTorch, to compare with.

It shares no code with saefw: it reads the shards and the splits of a recording with safetensors and DuckDB, and does
what a first notebook would: centre, scale, the k largest of a dense encoder, a dense decoder, Adam, rows of norm 1.

    python benchmarks/plain_topk.py runs/plain_topk/record/ADDRESS --k 32
"""

import argparse
import time
from pathlib import Path

import duckdb
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize


def main() -> None:
    """Train one SAE and print what it explains of the held-out tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--n-tokens", type=int, default=2_900_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    table = options.recording / "example.parquet"
    splits = [row[0] for row in duckdb.sql(f"SELECT split FROM '{table}' ORDER BY example").fetchall()]
    acts_ted = torch.cat(
        [load_file(file)["acts"] for file in sorted(options.recording.glob("acts-*.safetensors"))], dim=1
    )
    chosen = {name: torch.tensor([split == name for split in splits]) for name in ("train", "valid")}
    x_nd, valid_nd = (acts_ted[1:, chosen[name]].flatten(0, 1).float() for name in ("train", "valid"))
    del acts_ted
    mean_d = x_nd.double().mean(dim=0).float()
    scale = (x_nd - mean_d).double().square().mean().sqrt().float()

    torch.manual_seed(options.seed)
    W_dec = normalize(torch.randn(options.d_sae, x_nd.shape[1]), dim=1).requires_grad_()
    W_enc = W_dec.detach().T.clone().requires_grad_()
    b_enc, b_dec = torch.zeros(options.d_sae, requires_grad=True), torch.zeros(x_nd.shape[1], requires_grad=True)
    adam = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=options.lr)

    def codes(x: torch.Tensor) -> torch.Tensor:
        pre = (x - b_dec) @ W_enc + b_enc
        top = pre.topk(options.k, dim=1)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())

    order, at, started = torch.randperm(len(x_nd)), 0, time.monotonic()
    for _ in range(options.n_tokens // options.batch_size):
        if at + options.batch_size > len(x_nd):
            order, at = torch.randperm(len(x_nd)), 0
        x = (x_nd[order[at : at + options.batch_size]] - mean_d) / scale
        at += options.batch_size
        loss = (codes(x) @ W_dec + b_dec - x).square().mean()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec  # type: ignore[operator]
            adam.step()
            W_dec.copy_(normalize(W_dec, dim=1))
    seconds = time.monotonic() - started

    error, n_fired, fired_s = 0.0, 0, torch.zeros(options.d_sae)
    with torch.no_grad():
        for x_part in valid_nd.split(4096):
            z = codes((x_part - mean_d) / scale)
            error += float(((z @ W_dec + b_dec) * scale + mean_d - x_part).double().square().sum())
            n_fired, fired_s = n_fired + int((z > 0).sum()), fired_s + (z > 0).sum(dim=0)
    variance = float((valid_nd.double() - valid_nd.double().mean(dim=0)).square().sum())
    print(
        f"k {options.k}: nmse {error / variance:.4f}, explained variance {1 - error / variance:.4f}, "
        f"l0 {n_fired / len(valid_nd):.2f}, dead {float((fired_s == 0).float().mean()):.4f}, {seconds:.0f} s, "
        f"{len(x_nd):,} train and {len(valid_nd):,} valid tokens"
    )


if __name__ == "__main__":
    main()
