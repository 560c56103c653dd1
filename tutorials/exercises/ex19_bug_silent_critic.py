"""Bug hunt 7: the critic that says nothing.

Seen      figures/bug7.png. PPO learns, and hardly slower than the reference run. But the critic's values are 0 in every
          step, for every state, and so the explained variance is 0, too. In step 20 the program measures how much there
          is to explain, and prints a note: the critic explains nothing of it.
Ask       The rewards look fine, and a note is soon out of sight. Which weights does its optimizer have?
Mend      this file, until `python -m tutorials.exercises.check 19` says pass. In the real loop it is called once,
          before the first step. --hint helps.
"""
import torch
from torch import nn

from grpo_min.model import ScalarGPT


def critic_and_optimizer(policy, lr):
    """The value network, which starts from the policy's weights with a head of zeros, and its optimizer."""
    critic = ScalarGPT(policy.config, policy.tokenizer)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    trunk = type(policy)(policy.config, policy.tokenizer)
    trunk.load_state_dict(policy.state_dict())
    critic.trunk = trunk
    critic.scalar = nn.Linear(policy.config.width, 1)
    nn.init.zeros_(critic.scalar.weight)
    nn.init.zeros_(critic.scalar.bias)
    return critic, optimizer
