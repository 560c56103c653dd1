"""Bug hunt 7, mended. Trap 17: a critic that never learns.

The optimizer was made before trunk and head were exchanged: it went on moving weights that nobody used any more.
"""
import torch
from torch import nn

from grpo_min.model import ScalarGPT


def critic_and_optimizer(policy, lr):
    """The value network, which starts from the policy's weights with a head of zeros, and its optimizer."""
    critic = ScalarGPT(policy.config, policy.tokenizer)
    trunk = type(policy)(policy.config, policy.tokenizer)
    trunk.load_state_dict(policy.state_dict())
    critic.trunk = trunk
    critic.scalar = nn.Linear(policy.config.width, 1)
    nn.init.zeros_(critic.scalar.weight)
    nn.init.zeros_(critic.scalar.bias)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    return critic, optimizer
