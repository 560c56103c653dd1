"""grpo_min: GRPO and PPO from scratch, side by side, on a small GPT."""
