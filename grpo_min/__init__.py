"""grpo_min: GRPO and PPO from scratch, side by side, on a small GPT."""
import os

# Before torch is imported: threads that wait shall sleep. By default they spin, and where another process wants the
# same core, as on Colab or beside a second run, everything takes many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
