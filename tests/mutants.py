"""Named mutants: the known bugs of GRPO and PPO, each as one wrong line, and the test that catches it.

`python -m tests.mutants` prints the table. tests/test_mutants.py puts each wrong line in place of the right one, in
memory, and runs the named test, which has to fail by its own assertion. The traps, nearly all of them found in public
implementations, are numbered as in TRAPS. `mutated(mutant)` is the source with the bug in it: find it.
"""
import importlib
import inspect
import types
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "grpo_min"
TRAPS = {
    1: "END is masked out, so that stopping is never trained",
    2: "tokens after END count in loss, KL, entropy or length",
    3: "an empty mask divides 0 by 0",
    4: "log-probabilities or values are off by one column",
    5: "sampled at one temperature or from the top k, scored otherwise",
    6: "decoded to text and encoded again: other ids than were sampled",
    7: "groups are mixed: the baseline is taken over the wrong axis",
    8: "equal rewards get advantages from rounding; a group of one",
    9: "the clip is inverted for negative advantages",
    10: "the ratio of the whole sequence where the token's is meant",
    11: "the KL with its sign or direction reversed, so that drifting is paid for",
    12: "k1 as a loss, whose expected gradient is zero; another estimator than k1 in the reward",
    13: "a mean of means: minibatches change the gradient",
    14: "the sequence mean where the sum is promised",
    15: "a value after the last token that is not 0; the reward one token late",
    16: "whitening over padding",
    17: "a critic that never learns",
    18: "a reference that moves along; a policy that is not the same function in sampler and trainer",
    19: "rewards by substring or by eval",
    20: "the KL is charged twice",
    21: "the padding of a prompt is attended to, or shifts the positions",
    22: "a learned reward is read at the wrong token",
}


@dataclass
class Mutant:
    trap: int
    file: str       # in grpo_min/
    right: str      # a line that stands there once, without its indentation and its trailing comment
    wrong: str
    test: str       # file in tests/ :: test, without test_

    @property
    def node(self):
        """The test as pytest names it."""
        file, test = self.test.split("::")
        return f"tests/test_{file}.py::test_{test}"


MUTANTS = [Mutant(*row) for row in [
    (1, "rollout", "mask[rows, t] = on", "mask[rows, t] = on & (token != END)",
     "rollout::mask_ends_with_end"),
    (1, "rollout", "ids, length = pad([encode_completion(text, end) for text, end in zip(texts, finished)], device)",
     "ids, length = pad([encode_completion(text, False) for text, end in zip(texts, finished)], device)",
     "rollout::completions_are_padded_after_end"),
    (1, "sft", "return F.cross_entropy(model.head(states), ids[:, 1:][response]) * weight, {}",
     "return F.cross_entropy(model.head(states), ids[:, 1:][response], ignore_index=1) * weight, {}",
     "stages::sft_loss_by_hand"),

    (2, "grpo", "return -(surrogate * mask).sum(dim=1).mean()", "return -surrogate.sum(dim=1).mean()",
     "algorithms::tokens_after_the_end_have_no_effect"),
    (2, "rollout", "return self.mask.sum(1)", "return (self.completion_ids != PAD).sum(1)",
     "rollout::mask_ends_with_end"),
    (2, "metrics", "tokens = mask.sum().clamp(min=1)", "tokens = torch.tensor(mask.numel())",
     "metrics::update_metrics_by_hand"),
    (2, "metrics", "clip_low=((ratio < 1 - clip_eps) & mask).sum().item() / tokens.item(),",
     "clip_low=(ratio < 1 - clip_eps).sum().item() / tokens.item(),",
     "metrics::update_metrics_by_hand"),
    (2, "ppo", "return 0.5 * (error * mask).sum(dim=1).mean()", "return 0.5 * error.sum(dim=1).mean()",
     "algorithms::value_loss_by_hand"),

    (3, "grpo", "return -(surrogate * mask).sum(dim=1).mean()",
     "return -((surrogate * mask).sum(dim=1) / mask.sum(dim=1)).mean()",
     "algorithms::rows_without_a_token_are_finite"),
    (3, "ppo", "return 0.5 * (error * mask).sum(dim=1).mean()",
     "return 0.5 * ((error * mask).sum(dim=1) / mask.sum(dim=1)).mean()",
     "algorithms::rows_without_a_token_are_finite"),

    (4, "rollout", "states = policy.states(prompts, completion_ids[:, :-1], mask[:, 1:])[mask]",
     "states = policy.states(prompts, completion_ids, mask)[:, 1:][mask]",
     "rollout::token_logprobs_by_hand"),
    (4, "model", "return self.head(self.states(prompts, completion_ids[:, :-1]))",
     "return self.head(self.states(prompts, completion_ids)[:, 1:])",
     "model::a_column_never_sees_its_own_token"),
    (4, "ppo", "old_values = critic.values(prompts, rollout.completion_ids, rollout.mask)",
     "old_values = critic(prompts, rollout.completion_ids, rollout.mask)[:, 1:]",
     "loops::critic_starts_from[reward_model]"),
    (4, "ppo", "values = critic.values(*part)", "values = critic(*part)[:, 1:]",
     "invariances::gradient_is_that_of_the_rows_one_by_one[ppo]"),

    (5, "rollout", "probs = policy.head(state / temperature).softmax(dim=-1)",
     "probs = policy.head(state).softmax(dim=-1)",
     "rollout::frequencies_match_the_policy[0.7]"),
    (5, "rollout", "all_logprobs = policy.head(states / temperature).log_softmax(dim=-1)",
     "all_logprobs = policy.head(states).log_softmax(dim=-1)",
     "rollout::logprobs_are_those_of_training[1.3]"),
    (5, "rollout", "parts = [token_logprobs(policy, *part, temperature)[0] for part, _ in split(prompts, rollout, "
     "minibatches)]",
     "parts = [token_logprobs(policy, *part, 1.0)[0] for part, _ in split(prompts, rollout, minibatches)]",
     "loops::reference_does_not_move[loss-1-grpo]"),
    (5, "rollout", "token = inverse_cdf(probs, uniforms)",
     "token = inverse_cdf(probs * (probs >= probs.topk(5)[0][:, -1:]), uniforms)",
     "rollout::frequencies_match_the_policy[1.0]"),

    (6, "grpo", "rewards, texts = score(reward, batch, rollout, config.group_size)",
     "rewards, texts = score(reward, batch, rollout, config.group_size); from grpo_min.rollout import pad_completions; "
     "rollout.completion_ids, rollout.mask = pad_completions(texts, device, rollout.finished.tolist())",
     "loops::trained_ids_are_the_sampled_ones[grpo]"),
    (6, "ppo", "rewards, texts = score(reward, batch, rollout, config.group_size)",
     "rewards, texts = score(reward, batch, rollout, config.group_size); from grpo_min.rollout import pad_completions; "
     "rollout.completion_ids, rollout.mask = pad_completions(texts, device, rollout.finished.tolist())",
     "loops::trained_ids_are_the_sampled_ones[ppo]"),

    (7, "grpo", "groups = rewards.double().cpu().view(-1, group_size)",
     "groups = rewards.double().cpu().view(group_size, -1).T",
     "algorithms::groups_are_not_mixed"),
    (7, "grpo", "baseline = groups.mean(dim=1, keepdim=True)", "baseline = groups.mean(dim=0, keepdim=True)",
     "algorithms::groups_are_not_mixed"),
    (7, "rollout", "state = last.repeat_interleave(group_size, dim=0)", "state = last.repeat(group_size, 1)",
     "rollout::rows_of_a_group_follow_each_other"),
    (7, "rollout", "memory = [[x[left // G] for x in layer] for layer in memory]",
     "memory = [[x[left % len(x)] for x in layer] for layer in memory]",
     "rollout::rows_that_ended_are_left_behind"),
    (7, "rewards", "repeated = [row for row in batch for _ in range(group_size)]",
     "repeated = [row for _ in range(group_size) for row in batch]",
     "rewards::columns_are_repeated_for_each_group"),

    (8, "grpo", "groups = rewards.double().cpu().view(-1, group_size)", "groups = rewards.view(-1, group_size)",
     "algorithms::equal_rewards_have_advantages_of_exactly_zero"),
    (8, "grpo", "if group_size < 2 or len(rewards) % group_size:", "if len(rewards) % group_size:",
     "algorithms::rewards_that_make_no_groups_are_refused[4-1]"),

    (9, "grpo", "surrogate = torch.min(ratio * advantages, clipped * advantages)",
     "surrogate = torch.max(ratio * advantages, clipped * advantages)",
     "algorithms::policy_loss_truth_table"),
    (9, "ppo", "surrogate = torch.min(ratio * advantages, clipped * advantages)",
     "surrogate = clipped * advantages",
     "algorithms::policy_loss_truth_table"),
    (9, "ppo", "error = torch.max(error, (near - returns) ** 2)", "error = torch.min(error, (near - returns) ** 2)",
     "algorithms::value_loss_with_clipping_by_hand"),

    (10, "grpo", "ratio = (logprobs - old_logprobs).exp()",
     "ratio = ((logprobs - old_logprobs) * mask).sum(dim=1, keepdim=True).exp().expand_as(logprobs)",
     "algorithms::each_token_has_its_own_ratio"),
    (10, "ppo", "ratio = (logprobs - old_logprobs).exp()", "ratio = (old_logprobs - logprobs).exp()",
     "algorithms::policy_loss_truth_table"),

    (11, "grpo", "log_ratio = ref_logprobs - logprobs", "log_ratio = logprobs - ref_logprobs",
     "algorithms::kl_estimates_by_hand"),
    (11, "grpo", "objective = objective + config.beta * (penalty * mask).sum(dim=1).mean()",
     "objective = objective - config.beta * (penalty * mask).sum(dim=1).mean()",
     "loops::a_penalty_keeps_the_policy_at_the_reference[grpo]"),
    (11, "ppo", "charged = charged - config.beta * charge * rollout.mask",
     "charged = charged + config.beta * charge * rollout.mask",
     "loops::kl_in_the_reward_is_charged_once[1-ppo]"),

    (12, "grpo", "return torch.expm1(log_ratio) - log_ratio", "return -log_ratio",
     "exact::gradients_of_the_kl"),
    (12, "grpo", 'require(config.kl_in == "loss" or config.kl == "k1", "--kl-in reward needs --kl k1: k2 and k3 in the '
     'reward have "',
     'require(True, "--kl-in reward needs --kl k1: k2 and k3 in the reward have "',
     "cli::kl_in_the_reward_needs_k1[grpo]"),

    (13, "grpo", "return -(surrogate * mask).sum(dim=1).mean()", "return -(surrogate * mask).sum() / mask.sum()",
     "invariances::split_into_minibatches[2-grpo]"),
    (13, "ppo", "return 0.5 * (error * mask).sum(dim=1).mean()", "return 0.5 * (error * mask).sum() / mask.sum()",
     "invariances::split_into_minibatches[2-ppo]"),
    (13, "ppo", "objective = objective + config.beta * (penalty * mask).sum(dim=1).mean()",
     "objective = objective + config.beta * (penalty * mask).sum() / mask.sum()",
     "invariances::split_into_minibatches[4-ppo]"),

    (14, "grpo", "return -(surrogate * mask).sum(dim=1).mean()",
     "return -((surrogate * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()",
     "algorithms::loss_sums_over_tokens_and_averages_over_rows"),
    (14, "grpo", "objective = objective + config.beta * (penalty * mask).sum(dim=1).mean()",
     "objective = objective + config.beta * ((penalty * mask).sum(dim=1) / mask.sum(dim=1)).mean()",
     "loops::kl_in_the_loss_is_charged_once[1-grpo]"),

    (15, "ppo", "rewards, values = rewards * mask, values * mask", "rewards = rewards * mask",
     "algorithms::value_after_the_last_token_is_zero"),
    (15, "ppo", "return scores[:, None] * (columns == mask.sum(dim=1, keepdim=True) - 1)",
     "return scores[:, None] * (columns == mask.sum(dim=1, keepdim=True))",
     "algorithms::score_stands_on_the_last_real_token"),
    (15, "ppo", "delta = rewards[:, t] + gamma * next_value - values[:, t]",
     "delta = rewards[:, t] + gamma * (next_value if t + 1 < rewards.shape[1] else values[:, t]) - values[:, t]",
     "algorithms::gae_is_its_definition"),

    (16, "ppo", "real = advantages[mask]", "real = advantages.flatten()",
     "algorithms::whitening_ignores_the_padding"),
    (16, "ppo", "return (advantages - real.mean()) / (real.std() + 1e-4) * mask",
     "return (advantages - real.mean()) / (real.std() + 1e-4)",
     "algorithms::whitening_ignores_the_padding"),

    (17, "ppo", "update(run, critic, critic_optimizer, config.value_coef * error, config.max_grad_norm)",
     "update(run, critic, critic_optimizer, (config.value_coef * error).detach().requires_grad_(), "
     "config.max_grad_norm)",
     "loops::critic_gets_a_gradient_everywhere"),
    (17, "ppo", "critic_optimizer = optimizer_for(critic, config.critic_lr)",
     "critic_optimizer = optimizer_for(critic.scalar, config.critic_lr)",
     "loops::critic_gets_a_gradient_everywhere"),

    (18, "grpo", "reference = copy.deepcopy(policy).requires_grad_(False) if config.beta > 0 else None",
     "reference = policy if config.beta > 0 else None",
     "loops::reference_does_not_move[loss-1-grpo]"),
    (18, "ppo", "reference = copy.deepcopy(policy).requires_grad_(False) if config.beta > 0 else None",
     "reference = copy.copy(policy) if config.beta > 0 else None",
     "loops::reference_does_not_move[loss-1-ppo]"),
    (18, "model", "x = x + y", "x = x + F.dropout(y, 0.1, self.training)",
     "rollout::logprobs_are_those_of_training[1.0]"),

    (19, "rewards", "return [float(end and final_answer(c) == a) for c, a, end in zip(completions, answer, finished)]",
     "return [float(end and a in c) for c, a, end in zip(completions, answer, finished)]",
     "rewards::truth_table"),
    (19, "rewards", "return [float(end and final_answer(c) == a) for c, a, end in zip(completions, answer, finished)]",
     "return [float(end and eval(final_answer(c)) == int(a)) for c, a, end in zip(completions, answer, finished)]",
     "rewards::truth_table[20+8-0-0]"),
    (19, "rewards", 'return None if "<think>" in answer or "</think>" in answer else answer.strip()',
     'return (re.findall(r"\\d+", answer) or [None])[-1]',
     "rewards::truth_table"),

    (20, "grpo", "trained = rollout if config.beta > 0 else replace(rollout, mask=rollout.mask & (advantages != 0))",
     "trained = replace(rollout, mask=rollout.mask & (advantages != 0))",
     "loops::with_a_penalty_groups_of_equals_are_trained_too"),
    (20, "grpo", 'if config.beta > 0 and config.kl_in == "loss":', "if config.beta > 0:",
     "loops::kl_in_the_reward_is_charged_once[1-grpo]"),
    (20, "ppo", 'if config.beta > 0 and config.kl_in == "reward":', "if config.beta > 0:",
     "loops::kl_in_the_loss_is_charged_once[2-ppo]"),

    (21, "model", "hidden = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)",
     "hidden = torch.zeros(mask.shape, device=mask.device)",
     "model::two_parts_equal_one_sequence"),
    (21, "model", "positions = prompts.length.repeat_interleave(G)[:, None] + torch.arange(N, device=last.device)",
     "positions = prompts.ids.shape[1] + torch.arange(N, device=last.device).expand(completion_ids.shape)",
     "model::two_parts_equal_one_sequence"),
    (21, "model", "last = states[torch.arange(len(states), device=states.device), prompts.length - 1]",
     "last = states[:, -1]",
     "model::two_parts_equal_one_sequence"),
    (21, "rollout", "position = prompts.length.repeat_interleave(group_size)",
     "position = torch.full((B,), P, device=device)",
     "rollout::logprobs_are_those_of_training[1.0]"),

    (22, "model", "return self(prompts, completion_ids, mask).gather(1, mask.sum(1, keepdim=True)).squeeze(1)",
     "return self(prompts, completion_ids)[:, -1]",
     "model::last_reads_the_last_real_token"),
    (22, "model", "return self(prompts, completion_ids, mask).gather(1, mask.sum(1, keepdim=True)).squeeze(1)",
     "return self(prompts, completion_ids, mask).gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)",
     "model::last_reads_the_last_real_token"),
    (22, "rewards", "ids, length = pad([(encode_prompt(p) + encode_completion(c, end))[:context] for p, c, end in "
     "part], device)",
     "ids, length = pad([(encode_prompt(p) + encode_completion(c, False))[:context] for p, c, end in part], device)",
     "rewards::learned_reward_reads_the_text_and_end[256]"),
]]


def source(mutant):
    return (PACKAGE / f"{mutant.file}.py").read_text(encoding="utf-8")


def mutated(mutant):
    """The source of the file with the wrong line in place of the right one. ValueError unless it stands there once."""
    lines = source(mutant).splitlines()
    found = [i for i, line in enumerate(lines) if line.strip().split("  #")[0].rstrip() == mutant.right]
    if len(found) != 1:
        raise ValueError(f"{mutant.file}.py has this line {len(found)} times: {mutant.right}")
    line = lines[found[0]]
    lines[found[0]] = line[:len(line) - len(line.lstrip())] + mutant.wrong
    return "\n".join(lines) + "\n"


def functions(namespace, module):
    """{name: function} of a module's own functions and methods, without their decorators."""
    found = {}
    for name, thing in namespace.items():
        thing = getattr(thing, "fget", None) or getattr(thing, "__func__", thing)           # a property, a classmethod
        if getattr(thing, "__module__", None) != module:
            continue
        if inspect.isclass(thing):
            found.update({f"{name}.{inner}": function for inner, function in functions(vars(thing), module).items()})
        elif callable(thing):
            found[name] = inspect.unwrap(thing)
    return found


@contextmanager
def applied(mutant):
    """Run with the bug: the functions of the loaded module get the code of the mutated source, wherever they are used.

    Only code inside of functions is exchanged. ValueError if nothing differs.
    """
    module = importlib.import_module(f"grpo_min.{mutant.file}")
    copy = types.ModuleType(module.__name__)
    exec(compile(mutated(mutant), module.__file__, "exec"), vars(copy))
    right, wrong = (functions(vars(each), module.__name__) for each in (module, copy))
    changed = {function: function.__code__ for name, function in right.items()
               if function.__code__ != wrong[name].__code__}
    if not changed:
        raise ValueError(f"the wrong line changes no function: {mutant.wrong}")
    for name, function in right.items():
        if function in changed:
            function.__code__ = wrong[name].__code__
    try:
        yield
    finally:
        for function, code in changed.items():
            function.__code__ = code


def main():
    for trap, name in TRAPS.items():
        print(f"\n{trap}. {name}")
        for mutant in MUTANTS:
            if mutant.trap == trap:
                print(f"   {mutant.file}.py\n     right  {mutant.right}\n     wrong  {mutant.wrong}\n"
                      f"     test   {mutant.node}")
    files = {mutant.file for mutant in MUTANTS}
    print(f"\n{len(MUTANTS)} mutants of {len(TRAPS)} traps in {len(files)} files")


if __name__ == "__main__":
    main()
