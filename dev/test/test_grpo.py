"""
test_grpo.py: the policy's loss and its gradient against TRL's own implementation.

Random logits, rewards and masks go through TRL's GRPOTrainer (its method that computes the loss, in double precision) and through
bitnet/policy.h, compiled as a library from policy_library.c. Compared are the loss, the gradient of the logits and the advantages, for
each reduction that both have, with and without the penalty (TRL has the estimate k3; the exact penalty and k1, k2 are compared with
PyTorch's own kl_div and with autograd). Needs torch and trl:

    pip install torch trl
    python dev/test/test_grpo.py
"""
import ctypes
import os
import subprocess
import sys
import tempfile
import types

import numpy as np
import torch

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
BOUND = 1e-6          # relative, of the loss against its largest term and of the gradient against its largest element
REDUCTIONS = {"seq": (0, "grpo"), "token": (1, "bnpo"), "dr": (2, "dr_grpo")}
KL = {"full": 0, "k3": 1, "k2": 2, "k1": 3, "seed": 4}
LONGEST = 11          # TRL's max_completion_length


def library():
    out = os.path.join(tempfile.mkdtemp(), "policy.so")
    subprocess.run(["gcc", "-O2", "-march=native", "-fopenmp", "-std=gnu11", "-shared", "-fPIC",
                    os.path.join(ROOT, "dev", "test", "policy_library.c"), "-lm", "-o", out], check=True)
    lib = ctypes.CDLL(out)
    lib.policy_case.restype = ctypes.c_double
    return lib


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def case(seed, B=6, T=9, V=37):
    """Random logits of two models, answers of 0 to T tokens, behaviour log-probabilities on both sides of the clipping range."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=g) * 2
    ref = logits + torch.randn(B, T, V, generator=g) * 0.5
    ids = torch.randint(V, (B, T), generator=g)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    lengths[0], lengths[1] = T, 0
    mask = (torch.arange(T) < lengths[:, None]).long()
    logp = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old = (logp + 0.25 * torch.randn(B, T, generator=g).double()).float()
    ref_logp = ref.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0].float()
    advantage = torch.randn(B, generator=g)
    return dict(logits=logits, ref=ref, ids=ids, mask=mask, old=old, ref_logp=ref_logp, advantage=advantage)


def ours(lib, c, reduction, kl, beta, low, high):
    B, T, V = c["logits"].shape
    arrays = dict(logits=c["logits"].numpy(), ref=c["ref"].numpy(), old=c["old"].numpy(), ref_logp=c["ref_logp"].numpy(),
                  advantage=c["advantage"].numpy())
    arrays = {k: np.ascontiguousarray(v, np.float32) for k, v in arrays.items()}
    targets = np.ascontiguousarray(torch.where(c["mask"] > 0, c["ids"], -1).numpy(), np.int32)
    grad, kl_mean = np.zeros((B, T, V), np.float32), ctypes.c_double()
    loss = lib.policy_case(B, T, V, pointer(arrays["logits"]), pointer(arrays["ref"]), pointer(targets), pointer(arrays["old"]),
                           pointer(arrays["ref_logp"]), pointer(arrays["advantage"]), ctypes.c_double(low), ctypes.c_double(high),
                           ctypes.c_double(beta), KL[kl], REDUCTIONS[reduction][0], LONGEST, pointer(grad), ctypes.byref(kl_mean))
    return loss, grad, kl_mean.value


def trl_loss(c, reduction, beta, low, high):
    """GRPOTrainer's own method on these numbers; what it would ask of a model and an accelerator is put in its place."""
    from trl import GRPOTrainer

    logits = c["logits"].double().requires_grad_(True)
    logp = logits.log_softmax(-1).gather(-1, c["ids"][..., None])[..., 0]
    me = types.SimpleNamespace(
        loss_type=REDUCTIONS[reduction][1], beta=beta, epsilon_low=low, epsilon_high=high, max_completion_length=LONGEST,
        importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1, model=types.SimpleNamespace(training=True),
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False), _metrics={"train": _Any(), "eval": _Any()},
        accelerator=types.SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None))
    prompt = torch.zeros(len(c["ids"]), 1, dtype=torch.long)
    loss = GRPOTrainer._compute_loss(me, None, dict(
        prompt_ids=prompt, prompt_mask=torch.ones_like(prompt), completion_ids=c["ids"], completion_mask=c["mask"],
        advantages=c["advantage"].double(), old_per_token_logps=c["old"].double(), ref_per_token_logps=c["ref_logp"].double()))
    loss.backward()
    return loss.item(), logits.grad.numpy()


class _Any(dict):
    """A dictionary of lists for the metrics that TRL collects."""

    def __missing__(self, key):
        self[key] = []
        return self[key]


def torch_loss(c, reduction, kl, beta, low, high):
    """The same in plain PyTorch, for the penalties that TRL does not have; the exact one is PyTorch's kl_div."""
    logits = c["logits"].double().requires_grad_(True)
    all_logp, q = logits.log_softmax(-1), c["ref"].double().log_softmax(-1)
    logp = all_logp.gather(-1, c["ids"][..., None])[..., 0]
    rho, A = (logp - c["old"].double()).exp(), c["advantage"].double()[:, None]
    d = logp - c["ref_logp"].double()
    k = {"full": lambda: torch.nn.functional.kl_div(q, all_logp, log_target=True, reduction="none").sum(-1),
         "k3": lambda: (-d).exp() + d - 1, "k2": lambda: d * d / 2, "k1": lambda: d, "seed": lambda: logp.exp() * d}[kl]()
    token = -torch.minimum(rho * A, rho.clamp(1 - low, 1 + high) * A) + beta * k
    m = c["mask"].double()
    n = m.sum(-1)
    loss = {"seq": lambda: ((token * m).sum(-1) / n.clamp(min=1)).mean(), "token": lambda: (token * m).sum() / m.sum(),
            "dr": lambda: (token * m).sum() / (len(m) * LONGEST)}[reduction]()
    loss.backward()
    return loss.item(), logits.grad.numpy(), ((k * m).sum() / m.sum()).item()


def main():
    lib, passed, failed = library(), 0, 0

    def check(name, got, want, scale):
        nonlocal passed, failed
        error = np.max(np.abs(np.asarray(got) - np.asarray(want))) / scale
        ok = error <= BOUND   # a NaN fails
        passed, failed = passed + ok, failed + (not ok)
        if not ok:
            print(f"FAIL  {name}: relative error {error:.3g}, bound {BOUND:g}")

    for seed in range(4):
        c = case(seed)
        for reduction in REDUCTIONS:
            for beta in (0.0, 0.04, 1.0):
                loss, grad, _ = ours(lib, c, reduction, "k3", beta, 0.2, 0.28)
                want, want_grad = trl_loss(c, reduction, beta, 0.2, 0.28)
                name = f"TRL, seed {seed}, {reduction}, beta {beta}"
                check(name + ", loss", loss, want, 1)
                check(name + ", gradient", grad, want_grad, np.abs(want_grad).max())
            for kl in KL:
                loss, grad, mean = ours(lib, c, reduction, kl, 0.7, 0.1, 0.3)
                want, want_grad, want_mean = torch_loss(c, reduction, kl, 0.7, 0.1, 0.3)
                name = f"torch, seed {seed}, {reduction}, {kl}"
                check(name + ", loss", loss, want, 1)
                check(name + ", gradient", grad, want_grad, np.abs(want_grad).max())
                check(name + ", mean", mean, want_mean, 1)
        # Padding: the same answers in longer rows.
        longer = {k: torch.nn.functional.pad(v, (0, 0) * (v.dim() - 2) + (0, 5)) if v.dim() > 1 else v for k, v in c.items()}
        a, b = ours(lib, c, "seq", "full", 0.5, 0.2, 0.2), ours(lib, longer, "seq", "full", 0.5, 0.2, 0.2)
        check(f"padding, seed {seed}", [a[0], np.abs(a[1] - b[1][:, : a[1].shape[1]]).max(), np.abs(b[1][:, a[1].shape[1]:]).max()],
              [b[0], 0, 0], 1)

    # Advantages, against the formula in TRL's trainer: group deviation without a correction of its own but torch.std's N - 1.
    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)).double()
    rewards[2] = 0.3
    A = np.zeros((5, 4))
    equal = lib.policy_advantages(pointer(A), pointer(np.ascontiguousarray(rewards.numpy())), 5, 4, 0)
    want = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    want[2] = 0
    check("advantages: group", A, want.numpy(), 1)
    check("advantages: equal groups", equal, 1, 1)
    lib.policy_advantages(pointer(A), pointer(np.ascontiguousarray(rewards.numpy())), 5, 4, 1)
    check("advantages: batch", A, ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)).numpy(), 1)
    d = rewards - rewards.mean(1, keepdim=True)
    lib.policy_advantages(pointer(A), pointer(np.ascontiguousarray(rewards.numpy())), 5, 4, 3)
    check("advantages: seed003", A, ((d - d.mean()) / (d.std() + 1e-8)).numpy(), 1)
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
