"""The fused RLOO loss in a plain torch loop: `python examples/loss_in_a_loop.py`.

Needs torch alone. The policy is a small GRU, and the task is to count: after the prompt d it must
write exactly d tokens and then EOS. Nobody shows it how; it gets a reward between 0 and 1 for each
completion, and the loss compares the K completions of a prompt with each other.
"""

from __future__ import annotations

import argparse

import torch
from rloo_kernels import fused_linear_rloo_loss
from torch import Tensor, nn

EOS, VOCAB, LONGEST = 0, 12, 10  # ids 1 .. 8 are prompts; a completion has at most LONGEST tokens


class Policy(nn.Module):
    """Token ids -> hidden states; `head.weight` makes logits of them."""

    def __init__(self, hidden: int = 64):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # (R, T) -> (R, T, D)
        return self.gru(self.embed(ids))[0]


@torch.no_grad()
def sample(policy: Policy, prompts: Tensor) -> Tensor:  # (R,) -> (R, LONGEST)
    """Completions, drawn token by token; what follows an EOS does not count."""
    token, state, tokens = prompts[:, None], None, []
    for _ in range(LONGEST):
        hidden, state = policy.gru(policy.embed(token), state)
        token = torch.multinomial(policy.head(hidden[:, -1]).softmax(-1), 1)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


def main(argv: list[str] | None = None) -> list[float]:
    """Train; the mean reward of every step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=32, help="prompts per step")
    parser.add_argument("--num_generations", type=int, default=8, help="completions per prompt")
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate)
    history = []
    for step in range(args.steps):
        # K completions of each prompt: rows i K .. (i + 1) K - 1 belong to prompt i
        prompts = torch.randint(1, 9, (args.prompts,)).repeat_interleave(args.num_generations)
        completions = sample(policy, prompts)

        # tokens that count: up to and including the first EOS
        ended_before = (completions == EOS).cumsum(1) - (completions == EOS).int()
        counts = ended_before == 0
        lengths = counts.sum(1)
        written = (counts & (completions != EOS)).sum(1)
        rewards = 1 - (written - prompts).abs() / LONGEST

        # hidden states that predict those tokens, row after row: (N, D)
        ids = torch.cat([prompts[:, None], completions[:, :-1]], dim=1)
        hidden = policy(ids)[counts]
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

        out = fused_linear_rloo_loss(
            hidden, policy.head.weight, completions[counts], cu_seqlens,
            rewards=rewards, num_generations=args.num_generations,
        )  # fmt: skip
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append(rewards.mean().item())
        if step % 25 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  reward {history[-1]:.3f}  tokens {int(lengths.sum())}")
    return history


if __name__ == "__main__":
    main()
