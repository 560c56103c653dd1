"""The loop of the supervised stages."""
import math

from grpo_min.run.log import Run
from grpo_min.run.optim import optimizer_for, update
from grpo_min.run.ranks import mean_of_rows


def fit(config, model, inputs, loss_at, weight_decay=0.0, evaluate=None):
    """Train on loss_at(step) with AdamW, linear warm-up, cosine decay -> rows of metrics.

    loss_at returns a loss and a dict of metrics; evaluate(model, step) -> dict joins them
    after the update. config: run, resume, steps, lr, warmup.
    """
    optimizer = optimizer_for(model, config.lr, weight_decay)
    parts = dict(model=model, optimizer=optimizer)
    with Run(config, inputs, parts, schedule=True) as run:
        for step in range(run.first_step, config.steps):
            decay = 0.5 + 0.5 * math.cos(math.pi * step / config.steps)
            lr = config.lr * min((step + 1) / config.warmup, decay)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, metrics = loss_at(step)
            norm = update(run, model, optimizer, loss)
            row = dict(loss=loss.item(), **metrics, lr=lr, grad_norm=norm)
            row |= evaluate(model, step) if evaluate else {}
            row = mean_of_rows(row, loss.device)
            run.step_done(step, row, f"loss {loss.item():.3f}")
        return run.rows
