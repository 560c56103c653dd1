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
    23: "a dead critic is not seen: what could be explained is measured wrongly, or nobody is told",
    24: "a schedule that stands still, an order or random numbers that repeat, a cache that confuses two things",
    25: "what a reward did not judge counts as 0",
    26: "DPO that prefers what was rejected, or whose implicit reward is not that of the completion",
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


ENCODED_AGAIN = ("; from grpo_min.rollout import pad_completions; rollout.completion_ids, rollout.mask = "
                 "pad_completions(texts, policy.tokenizer, clock.device, rollout.finished.tolist()); "
                 "rollout.logprobs = torch.zeros(rollout.mask.shape)")

PROMPT_COUNTED = (" + self.beta * sum(sign * model.plain(prompts.ids[:, :-1]).log_softmax(-1).gather(2, prompts.ids["
                  ":, 1:, None]).sum((1, 2)).repeat_interleave(2) for sign, model in ((1, self.policy), "
                  "(-1, self.reference)))")

MUTANTS = [Mutant(*row) for row in [
    (1, "rollout", "mask[:, t] = going", "mask[:, t] = going & (token != end)",
     "rollout::mask_ends_with_end[plain-8]"),
    (1, "run/fast", "mask[rows, t] = going", "mask[rows, t] = going & (token != end)",
     "rollout::mask_ends_with_end[fast-8]"),
    (1, "rollout", "rows = [tokenizer.encode_completion(text, end) for text, end in zip(texts, finished)]",
     "rows = [tokenizer.encode_completion(text, False) for text, end in zip(texts, finished)]",
     "rollout::completions_are_padded_after_end"),
    (1, "sft", "logprobs, _ = token_logprobs(model, prompts, ids, mask)",
     "logprobs, _ = token_logprobs(model, prompts, ids, mask & (ids != tokenizer.end))",
     "stages::sft_loss_by_hand"),
    (1, "rollout", "pad, end = policy.tokenizer.pad, policy.tokenizer.end", "pad, end = policy.tokenizer.pad, 1",
     "rollout::a_model_samples_and_stops_by_its_own_tokenizer[plain]"),
    (1, "run/fast", "self.finished |= token == self.policy.tokenizer.end", "self.finished |= token == 1",
     "fast::a_tokenizer_of_its_own_stops_both"),

    (2, "grpo", "return -((surrogate - penalty) * mask).sum(dim=1).mean()",
     "return -(surrogate - penalty).sum(dim=1).mean()",
     "algorithms::tokens_after_the_end_have_no_effect"),
    (2, "variants", "return -((surrogate - penalty) * mask).sum(dim=1).mean()",
     "return -(surrogate * mask - penalty).sum(dim=1).mean()",
     "variants::tokens_after_the_end_have_no_effect_and_empty_rows_are_finite[token-cispo]"),
    (2, "rollout", "return self.mask.sum(1)", "return (self.completion_ids != 0).sum(1)",
     "rollout::mask_ends_with_end[fast-8]"),
    (2, "run/metrics", "tokens = mask.sum().clamp(min=1)", "tokens = torch.tensor(mask.numel())",
     "metrics::update_metrics_by_hand"),
    (2, "run/metrics", "low = ((ratio < 1 - clip_eps) & mask).sum()", "low = (ratio < 1 - clip_eps).sum()",
     "metrics::update_metrics_by_hand"),
    (2, "run/metrics", "log_ratio = (ref_logprobs - rollout.logprobs) * rollout.mask",
     "log_ratio = ref_logprobs - rollout.logprobs",
     "metrics::rollout_metrics_by_hand"),
    (2, "run/fast", "self.finished |= token == self.policy.tokenizer.end",
     "self.finished = token == self.policy.tokenizer.end",
     "fast::the_recorded_steps_sample_what_the_plain_loop_does[1.0]"),
    (2, "variants", "change = ((logprobs - old_logprobs) * mask).sum(dim=1, keepdim=True)",
     "change = (logprobs - old_logprobs).sum(dim=1, keepdim=True)",
     "variants::sequence_ratio_is_each_completions_own"),
    (2, "variants", "log_w = ((logprobs - old_logprobs) * mask).sum(dim=1, keepdim=True).detach()",
     "log_w = (logprobs - old_logprobs).sum(dim=1, keepdim=True).detach()",
     "variants::vespo_by_hand"),
    (2, "ppo", "return 0.5 * (error * mask).sum(dim=1).mean()", "return 0.5 * error.sum(dim=1).mean()",
     "algorithms::value_loss_by_hand"),

    (3, "grpo", "return -((surrogate - penalty) * mask).sum(dim=1).mean()",
     "return -(((surrogate - penalty) * mask).sum(dim=1) / mask.sum(dim=1)).mean()",
     "algorithms::rows_without_a_token_are_finite"),
    (3, "ppo", "return 0.5 * (error * mask).sum(dim=1).mean()",
     "return 0.5 * ((error * mask).sum(dim=1) / mask.sum(dim=1)).mean()",
     "algorithms::rows_without_a_token_are_finite"),
    (3, "variants", "return (change / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(logprobs)",
     "return (change / mask.sum(dim=1, keepdim=True)).expand_as(logprobs)",
     "variants::tokens_after_the_end_have_no_effect_and_empty_rows_are_finite[sum-sequence]"),

    (4, "rollout", "states = policy.states(prompts, completion_ids[:, :-1], mask[:, 1:])[real]",
     "states = policy.states(prompts, completion_ids, mask)[:, 1:][real]",
     "rollout::token_logprobs_by_hand[fast]"),
    (4, "model", "return self.head(self.states(prompts, completion_ids[:, :-1]))",
     "return self.head(self.states(prompts, completion_ids)[:, 1:])",
     "model::a_column_never_sees_its_own_token"),
    (4, "ppo", "old_values = critic.values(prompts, rollout.completion_ids, rollout.mask)",
     "old_values = critic(prompts, rollout.completion_ids, rollout.mask)[:, 1:]",
     "loops::critic_starts_from[checkpoint]"),
    (4, "ppo", "error = value_loss(critic.values(*part), old_values[b], returns[b],",
     "error = value_loss(critic.values(*part).roll(1, 1), old_values[b], returns[b],",
     "invariances::gradient_is_that_of_the_rows_one_by_one[ppo]"),
    (4, "critic", "gains = (self.gain(states[:, :-1]) * taken).sum(dim=-1)",
     "gains = (self.gain(states[:, 1:]) * taken).sum(dim=-1)",
     "critic::a_value_is_the_prompt_s_and_the_gain_of_each_token_so_far"),
    (4, "critic", "return torch.cat([self.scalar(states[:, 0]), gains], dim=1).cumsum(dim=1)",
     "return torch.cat([self.scalar(states[:, 0]), gains], dim=1)",
     "critic::a_value_is_the_prompt_s_and_the_gain_of_each_token_so_far"),
    (7, "critic", "values[rows, column] = scores.view(-1, copies).mean(dim=1).where(judged, math.nan)",
     "values[rows, column] = scores.view(copies, -1).mean(dim=0).where(judged, math.nan)",
     "critic::values_by_sampling_are_the_true_ones_on_average"),
    (7, "critic", "of = (rows // group_size).tolist()",
     "of = (rows % len(batch)).tolist()",
     "critic::values_by_sampling_are_the_true_ones_on_average"),
    (7, "critic", "scores, _ = score(reward, [batch[q] for q in of], whole, copies, policy.tokenizer)",
     "scores, _ = score(reward, [batch[-1] for q in of], whole, copies, policy.tokenizer)",
     "critic::values_by_sampling_are_the_true_ones_on_average"),

    (5, "rollout", "probs = policy.head(state / temperature).softmax(dim=-1)",
     "probs = policy.head(state).softmax(dim=-1)",
     "rollout::frequencies_match_the_policy[fast-0.7]"),
    (5, "rollout", "all_logprobs = policy.head(states / temperature).log_softmax(dim=-1)",
     "all_logprobs = policy.head(states).log_softmax(dim=-1)",
     "rollout::logprobs_are_those_of_training[fast-1.3]"),
    (5, "rollout", "parts = [token_logprobs(policy, *part, temperature)[0]",
     "parts = [token_logprobs(policy, *part, 1.0)[0]",
     "loops::reference_does_not_move[loss-1-grpo]"),
    (5, "rollout", "token = inverse_cdf(probs, uniforms)",
     "token = inverse_cdf(probs * (probs >= probs.topk(5)[0][:, -1:]), uniforms)",
     "rollout::frequencies_match_the_policy[plain-1.0]"),

    (6, "grpo", "rewards, texts = score(reward, batch, rollout, config.group_size, policy.tokenizer)",
     "rewards, texts = score(reward, batch, rollout, config.group_size, policy.tokenizer)" + ENCODED_AGAIN,
     "loops::trained_ids_are_the_sampled_ones[grpo]"),
    (6, "ppo", "rewards, texts = score(reward, batch, rollout, config.group_size, policy.tokenizer)",
     "rewards, texts = score(reward, batch, rollout, config.group_size, policy.tokenizer)" + ENCODED_AGAIN,
     "loops::trained_ids_are_the_sampled_ones[ppo]"),

    (7, "grpo", "groups = rewards.cpu().double().view(-1, group_size)",
     "groups = rewards.cpu().double().view(group_size, -1).T",
     "algorithms::groups_are_not_mixed"),
    (7, "grpo", "baseline = groups.mean(dim=1, keepdim=True)", "baseline = groups.mean(dim=0, keepdim=True)",
     "algorithms::groups_are_not_mixed"),
    (7, "model", "return repeat(states[rows, prompts.length - 1]), past, repeat(visible)[:, None]",
     "return states[rows, prompts.length - 1].repeat(group_size, 1), past, repeat(visible)[:, None]",
     "rollout::rows_of_a_group_follow_each_other[fast]"),
    (7, "model", "return x[:, None].expand(-1, group_size, *x.shape[1:]).flatten(0, 1)",
     "return x[None].expand(group_size, *x.shape).flatten(0, 1)",
     "model::reading_prompts_repeats_them_for_their_completions"),
    (7, "run/fast", "caches = [(keys[left], values[left]) for keys, values in caches]",
     "caches = [(keys[:len(left)], values[:len(left)]) for keys, values in caches]",
     "fast::rows_that_ended_are_left_behind"),
    (7, "run/fast", "rows, position = rows[left], position[left]",
     "rows, position = rows[left], position[:len(left)]",
     "fast::the_fast_sampler_draws_the_tokens_of_the_plain_one[40-24-1.0]"),
    (7, "dpo", "chosen, rejected = reward.last(*batch).view(-1, 2).unbind(dim=1)",
     "chosen, rejected = reward.last(*batch).view(2, -1)",
     "dpo::the_stage_s_loss_and_gradient_are_eq_7"),
    (7, "rewards", "fields = columns([row for row in batch for _ in range(group_size)])",
     "fields = columns([row for _ in range(group_size) for row in batch])",
     "rewards::columns_are_repeated_for_each_group"),
    (7, "variants", "numbers = [q * G + g for q in equal for g in range(G)]",
     "numbers = [q + g * len(groups) for q in equal for g in range(G)]",
     "variants::groups_of_equals_are_replaced_until_the_batch_is_full"),
    (7, "variants", "return group_advantages(rewards, group_size) / (rewards.std() + 1e-4)",
     "return group_advantages(rewards, len(rewards)) / (rewards.std() + 1e-4)",
     "variants::advantages_by_hand[batch_scaled-expected4]"),
    (7, "variants", "tokens = mask.sum(dim=1).view(-1, group_size).sum(dim=1)",
     "tokens = mask.sum(dim=1).view(group_size, -1).sum(dim=0)",
     "variants::prompts_count_alike_however_long_their_completions_are"),

    (8, "grpo", "groups = rewards.cpu().double().view(-1, group_size)", "groups = rewards.view(-1, group_size)",
     "algorithms::equal_rewards_have_advantages_of_exactly_zero"),
    (8, "grpo", "if group_size < 2 or len(rewards) % group_size:", "if len(rewards) % group_size:",
     "algorithms::rewards_that_make_no_groups_are_refused[4-1]"),

    (9, "grpo", "surrogate = torch.min(ratio * advantages, clipped * advantages)",
     "surrogate = torch.max(ratio * advantages, clipped * advantages)",
     "algorithms::policy_loss_truth_table"),
    (9, "ppo", "surrogate = torch.min(ratio * advantages, clipped * advantages)",
     "surrogate = clipped * advantages",
     "algorithms::policy_loss_truth_table"),
    (9, "ppo", "error = torch.max((values - returns) ** 2, (near - returns) ** 2)",
     "error = torch.min((values - returns) ** 2, (near - returns) ** 2)",
     "algorithms::value_loss_with_clipping_by_hand"),
    (9, "variants", "bound = torch.where(advantages > 0, high, low)",
     "bound = torch.where(advantages < 0, high, low)",
     "variants::clip_higher_by_hand"),
    (9, "variants", "tau = 1 + 0.05 * (advantages <= 0).to(ratio)", "tau = 1 + 0.05 * (advantages > 0).to(ratio)",
     "variants::sapo_by_hand"),
    (9, "variants", "log_ratio = log_ratio.clamp(max=math.log(config.clip_max))",
     "log_ratio = log_ratio.clamp(min=-math.log(config.clip_max))",
     "variants::two_sided_clip_by_hand"),

    (10, "grpo", "ratio = (logprobs - old_logprobs).exp()",
     "ratio = ((logprobs - old_logprobs) * mask).sum(dim=1, keepdim=True).exp().expand_as(logprobs)",
     "algorithms::each_token_has_its_own_ratio"),
    (10, "ppo", "ratio = (logprobs - old_logprobs).exp()", "ratio = (old_logprobs - logprobs).exp()",
     "algorithms::policy_loss_truth_table"),
    (10, "variants", "log_ratio = sequence_log_ratio(logprobs, old_logprobs, mask)",
     "log_ratio = sequence_log_ratio(logprobs, old_logprobs, mask) * mask.sum(dim=1, keepdim=True)",
     "variants::sequence_ratio_by_hand"),
    (10, "variants", "log_w = ((logprobs - old_logprobs) * mask).sum(dim=1, keepdim=True).detach()",
     "log_w = sequence_log_ratio(logprobs, old_logprobs, mask).detach()",
     "variants::vespo_by_hand"),

    (11, "grpo", "log_ratio = ref_logprobs - logprobs", "log_ratio = logprobs - ref_logprobs",
     "algorithms::kl_estimates_by_hand"),
    (11, "grpo", "penalty = config.beta * kl(logprobs, ref_logprobs[b], config.kl)",
     "penalty = -config.beta * kl(logprobs, ref_logprobs[b], config.kl)",
     "loops::a_penalty_keeps_the_policy_at_the_reference[grpo]"),
    (11, "ppo", "charged = rollout.at_last_token(rewards) - charge",
     "charged = rollout.at_last_token(rewards) + charge",
     "loops::kl_in_the_reward_is_charged_once[1-ppo]"),

    (11, "variants", "penalty = penalty * log_ratio.exp()", "penalty = penalty * log_ratio.exp().detach()",
     "exact::the_unbiased_kl_has_the_gradient_of_the_kl"),

    (12, "grpo", "return torch.expm1(log_ratio) - log_ratio", "return -log_ratio",
     "exact::gradients_of_the_kl"),
    (12, "grpo", 'require(config.kl_in == "loss" or config.kl == "k1", "--kl-in reward needs --kl k1: k2 "',
     'require(True, "--kl-in reward needs --kl k1: k2 "',
     "cli::kl_in_the_reward_needs_k1[grpo]"),

    (13, "grpo", "return -((surrogate - penalty) * mask).sum(dim=1).mean()",
     "return -((surrogate - penalty) * mask).sum() / mask.sum()",
     "invariances::split_into_minibatches[2-grpo]"),
    (13, "ppo", "return 0.5 * (error * mask).sum(dim=1).mean()", "return 0.5 * (error * mask).sum() / mask.sum()",
     "invariances::split_into_minibatches[2-ppo]"),
    (13, "ppo", "penalty = config.beta * kl(logprobs, ref_logprobs[b], config.kl)",
     "penalty = config.beta * kl(logprobs, ref_logprobs[b], config.kl) * len(mask) / mask.sum()",
     "invariances::split_into_minibatches[4-ppo]"),

    (14, "grpo", "return -((surrogate - penalty) * mask).sum(dim=1).mean()",
     "return -(((surrogate - penalty) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()",
     "algorithms::loss_sums_over_tokens_and_averages_over_rows"),
    (14, "grpo", "penalty = config.beta * kl(logprobs, ref_logprobs[b], config.kl)",
     "penalty = config.beta * kl(logprobs, ref_logprobs[b], config.kl) / mask.sum(dim=1, keepdim=True)",
     "loops::kl_in_the_loss_is_charged_once[1-grpo]"),
    (14, "variants", "advantages, penalty = advantages / divisor, penalty / divisor",
     "advantages = advantages / divisor",
     "variants::an_aggregation_divides_surrogate_and_penalty_alike[token-sequence]"),
    (14, "dpo", "return self.beta * (logprobs - ref_logprobs).sum(dim=1)",
     "return self.beta * (logprobs - ref_logprobs).sum(dim=1) / mask.sum(dim=1)",
     "dpo::it_is_the_sum_over_the_completion_and_the_prompt_does_not_count"),

    (15, "ppo", "rewards, values = rewards * mask, values * mask", "rewards = rewards * mask",
     "algorithms::value_after_the_last_token_is_zero"),
    (15, "rollout", "last = (self.length[:, None] - 1).clamp(min=0)",
     "last = self.length[:, None].clamp(max=self.mask.shape[1] - 1)",
     "algorithms::score_stands_on_the_last_real_token"),
    (15, "ppo", "delta = rewards[:, t] + gamma * next_value - values[:, t]",
     "delta = rewards[:, t] + gamma * (next_value if t + 1 < rewards.shape[1] else values[:, t]) - values[:, t]",
     "algorithms::gae_is_its_definition"),

    (16, "ppo", "real = advantages[mask]", "real = advantages.flatten()",
     "algorithms::whitening_ignores_the_padding"),
    (16, "ppo", "return (advantages - real.mean()) / (real.std() + 1e-4) * mask",
     "return (advantages - real.mean()) / (real.std() + 1e-4)",
     "algorithms::whitening_ignores_the_padding"),

    (17, "ppo", "error = value_loss(critic.values(*part), old_values[b], returns[b],",
     "error = value_loss(critic.values(*part).detach().requires_grad_(), old_values[b], returns[b],",
     "loops::critic_gets_a_gradient_everywhere"),
    (17, "critic", "gains = (self.gain(states[:, :-1]) * taken).sum(dim=-1)",
     "gains = (self.gain(states[:, :-1].detach()) * taken).sum(dim=-1)",
     "invariances::gradient_is_that_of_the_rows_one_by_one[ppo]"),
    (17, "ppo", "for _ in range(config.critic_epochs):",
     "for _ in range(config.epochs):",
     "loops::with_no_epochs_the_critic_stays_as_it_is"),
    (17, "ppo", "for part, b in split(prompts, rollout, config.critic_minibatches):",
     "for part, b in split(prompts, rollout, config.minibatches):",
     "settings::value_loss_gets_its_settings"),
    (17, "ppo", "load_model(config.critic, device, Critic, like=policy))", "policy.with_head(Critic))",
     "loops::critic_starts_from[checkpoint]"),
    (17, "critic", "error = (values - rewards[:, None])[rollout.mask]",
     "error = (values - rewards.mean())[rollout.mask]",
     "critic::it_learns_what_can_be_known[first_number]"),
    (17, "ppo", "critic_optimizer = optimizer_for(critic, config.critic_lr)",
     "critic_optimizer = optimizer_for(critic.scalar, config.critic_lr)",
     "loops::critic_gets_a_gradient_everywhere"),

    (18, "grpo", "reference = frozen_copy(policy) if config.beta > 0 else None",
     "reference = policy if config.beta > 0 else None",
     "loops::reference_does_not_move[loss-1-grpo]"),
    (18, "ppo", "reference = frozen_copy(policy) if config.beta > 0 else None",
     "import copy; reference = copy.copy(policy) if config.beta > 0 else None",
     "loops::reference_does_not_move[loss-1-ppo]"),
    (18, "dpo", "reward = ImplicitReward(policy, frozen_copy(policy), config.beta)",
     "reward = ImplicitReward(policy, policy, config.beta)",
     "dpo::the_reference_does_not_move"),
    (18, "real/lora", "self.linear.weight += self.scale * self.B @ self.A", "self.linear.weight += self.B @ self.A",
     "lora::a_checkpoint_holds_adapters_and_comes_back_as_an_ordinary_model[gpt-grpo]"),
    (18, "model", "x = x + y", "x = x + F.dropout(y, 0.1, self.training)",
     "rollout::logprobs_are_those_of_training[plain-1.0]"),
    (18, "run/fast", "hidden = hidden[:, None, None, :column + 1]",
     "hidden = F.pad(hidden[:, None, None, :column], (0, 1), value=-math.inf)",
     "fast::one_step_is_one_token_of_the_plain_forward"),
    (18, "run/fast", "state = step(policy, token, position + t, caches, hidden, P + t)",
     "state = step(policy, token, position, caches, hidden, P + t)",
     "fast::the_fast_sampler_draws_the_tokens_of_the_plain_one[40-24-1.0]"),
    (18, "run/fast", "k, v = (torch.cat(pair, dim=2) for pair in zip(past[layer], new))",
     "k, v = (torch.cat(pair, dim=2) for pair in zip(past[0], new))",
     "fast::with_a_mask_the_states_of_real_tokens_stay_as_they_are[ragged]"),
    (18, "run/fast", "return *(part[:, :used].clone() for part in parts), self.finished.clone()",
     "return *(part[:, :used] for part in parts), self.finished",
     "fast::a_decoder_is_used_again_for_other_prompts_and_after_the_weights_have_changed"),

    (19, "rewards", "return [float(end and final_answer(text) == right)", "return [float(end and right in text)",
     "rewards::truth_table"),
    (19, "rewards", "return [float(end and final_answer(text) == right)",
     "return [float(end and eval(final_answer(text)) == int(right))",
     "rewards::truth_table[20+8-0-0]"),
    (19, "rewards", 'return None if "<think>" in answer or "</think>" in answer else answer.strip()',
     'return (re.findall(r"\\d+", answer) or [None])[-1]',
     "rewards::truth_table"),

    (20, "grpo", "mask, penalty = rollout.mask[b], 0.0", "mask, penalty = rollout.mask[b] & (advantages[b] != 0), 0.0",
     "variants::surrogate_and_penalty_are_divided_alike_and_by_all_tokens[0.5-sum]"),
    (20, "grpo", 'if config.beta > 0 and config.kl_in == "loss":', "if config.beta > 0:",
     "loops::kl_in_the_reward_is_charged_once[1-grpo]"),
    (20, "ppo", 'if config.beta > 0 and config.kl_in == "reward":', "if config.beta > 0:",
     "loops::kl_in_the_loss_is_charged_once[2-ppo]"),

    (21, "model", "visible = columns < prompts.length[:, None]",
     "visible = columns < prompts.ids.shape[1] + 0 * prompts.length[:, None]",
     "model::two_parts_equal_one_sequence"),
    (21, "model", "positions = prompts.length.repeat_interleave(G)[:, None] + columns",
     "positions = prompts.ids.shape[1] + columns.expand(B, N)",
     "model::two_parts_equal_one_sequence"),
    (21, "model", "return repeat(states[rows, prompts.length - 1]), past, repeat(visible)[:, None]",
     "return repeat(states[:, -1]), past, repeat(visible)[:, None]",
     "model::two_parts_equal_one_sequence"),
    (21, "rollout", "position = prompts.length.repeat_interleave(G)",
     "position = torch.full((B,), prompts.ids.shape[1], device=device)",
     "rollout::logprobs_are_those_of_training[plain-1.0]"),
    (21, "run/fast", "position = prompts.length.repeat_interleave(B // Q)",
     "position = torch.full((B,), P, device=uniforms.device)",
     "rollout::logprobs_are_those_of_training[fast-1.0]"),
    (21, "run/fast", "x = pack(gpt.embed(ids, positions), rows)",
     "x = pack(gpt.tokens(ids) + gpt.positions(positions - positions[:, :1]), rows)",
     "fast::with_a_mask_the_states_of_real_tokens_stay_as_they_are[whole]"),
    (21, "run/fast", "token, hidden = token[left], hidden[left]",
     "token, hidden = token[left], hidden[:len(left)]",
     "fast::the_fast_sampler_draws_the_tokens_of_the_plain_one[40-24-1.0]"),
    (21, "run/fast", "self.hidden[:, :self.P] = F.pad(seen[:, 0], (0, self.P - P)).float().log()",
     "self.hidden[:, :self.P] = F.pad(seen[:, 0], (0, self.P - P), value=True).float().log()",
     "fast::a_decoder_is_used_again_for_other_prompts_and_after_the_weights_have_changed"),

    (22, "model", "return scores.gather(1, mask.sum(1, keepdim=True)).squeeze(1)", "return scores[:, -1]",
     "model::last_reads_the_last_real_token"),
    (22, "model", "return scores.gather(1, mask.sum(1, keepdim=True)).squeeze(1)",
     "return scores.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)",
     "model::last_reads_the_last_real_token"),
    (22, "rewards", "answered = [tokenizer.encode_completion(text, end)[:context - len(prompt)]",
     "answered = [tokenizer.encode_completion(text, False)[:context - len(prompt)]",
     "rewards::learned_reward_reads_the_text_and_end[256]"),

    (23, "critic", "first, second = first - first.mean(), second - second.mean()",
     "first, second = first + 0, second + 0",
     "critic::what_can_be_explained_is_the_variance_of_the_true_values"),
    (23, "critic", "return ((first * second).mean() / variance).item() if variance > 0 else \"\"",
     "return (second.square().mean() / variance).item() if variance > 0 else \"\"",
     "critic::the_ruler_measures_it_on_completions_and_second_ones"),
    (23, "critic", "return explainable_share(first[rollout.mask & known], second[rollout.mask & known])",
     "return explainable_share(first.flatten(), second.flatten())",
     "critic::the_ruler_measures_it_on_completions_and_second_ones"),
    (23, "critic", 'critic_share=explained / explainable if measured else "")',
     'critic_share=explained if measured else "")',
     "critic::the_share_of_the_critic"),
    (23, "ppo", 'explainable = "" if (step + 1) % 20 else explainable_variance(',
     'explainable = "" if (step + 1) % 200 else explainable_variance(',
     "critic::every_twentieth_step_is_measured_and_a_dead_critic_is_noted"),
    (23, "run/metrics", 'if name not in run.warned and row.get(name, "") != "" and is_trouble(row[name]):',
     'if name not in run.warned and row.get(name) and is_trouble(row[name]):',
     "critic::every_twentieth_step_is_measured_and_a_dead_critic_is_noted"),
    (23, "critic", 'f"oracle {completion_ids.sum()}")', '"oracle")',
     "critic::the_oracle_s_values_are_those_by_sampling"),
    (24, "run/fit", "lr = config.lr * min((step + 1) / config.warmup, decay)",
     "lr = config.lr * min((step + 1) / config.warmup, 1.0)", "stages::learning_rate_by_hand"),
    (24, "run/fit", "lr = config.lr * min((step + 1) / config.warmup, decay)", "lr = config.lr * decay",
     "stages::learning_rate_by_hand"),
    (24, "run/fit", 'group["lr"] = lr', 'group["lr"] = config.lr', "stages::learning_rate_by_hand"),
    (24, "pretrain", 'rows = pack(documents, config.context, f"{config.seed} {epoch}")',
     'rows = pack(documents, config.context, f"{config.seed}")', "stages::documents_have_another_order_in_each_epoch"),
    (24, "pretrain", 'rows = pack(documents, config.context, f"{config.seed} {epoch}")',
     'rows = pack(documents, config.context, f"{epoch}")', "stages::documents_have_another_order_in_each_epoch"),
    (24, "run/data", "order = torch.randperm(count, generator=generator(seed, epoch, rank=0))",
     "order = torch.randperm(count, generator=generator(seed, 0, rank=0))",
     "stages::rows_have_another_order_in_each_epoch_and_for_each_seed"),
    (24, "run/data", "order = torch.randperm(count, generator=generator(seed, epoch, rank=0))",
     "order = torch.randperm(count, generator=generator(0, epoch, rank=0))",
     "stages::rows_have_another_order_in_each_epoch_and_for_each_seed"),
    (24, "run/rng", 'key = f"{seed} {step}" + (f" rank {rank}" if rank else "")', 'key = f"{seed} {step}"',
     "stages::random_numbers_differ_between_seeds_steps_and_ranks"),
    (24, "run/rng", 'key = f"{seed} {step}" + (f" rank {rank}" if rank else "")',
     'key = f"{seed}{step}" + (f" rank {rank}" if rank else "")',
     "stages::random_numbers_differ_between_seeds_steps_and_ranks"),
    (24, "critic", "shuffle = generator(config.seed, epoch, rank=0)", "shuffle = generator(config.seed, 0, rank=0)",
     "stages::a_critic_sees_every_batch_once_in_an_epoch_and_each_epoch_in_another_order"),
    (24, "rewards", "return [scores[answer] for answer in answers]",
     "return [{key[:2]: score for key, score in scores.items()}[answer[:2]] for answer in answers]",
     "rewards::learned_reward_tells_a_text_that_was_cut_from_the_same_that_ended"),
    (24, "lab/compare", "weights = path.with_name(\"checkpoint.pt\")", "weights = path.with_name(\"nowhere\")",
     "brought::an_evaluation_belongs_to_its_weights"),

    (25, "variants", "rewards = groups.where(judged, mean.nan_to_num()).flatten()", "rewards = groups.flatten()",
     "variants::what_was_not_judged_has_the_mean_of_its_group_after_the_penalty_too"),
    (25, "rewards", "mean = groups.nanmean(dim=1, keepdim=True).nan_to_num()",
     "mean = groups.nan_to_num().mean(dim=1, keepdim=True)", "brought::what_is_not_judged_is_left_out_by_hand"),
    (25, "rewards", "rollout.mask &= judged.view(-1, 1).to(rollout.mask.device)", "rollout.mask &= True",
     "brought::a_completion_that_is_not_judged_teaches_nothing"),
    (25, "critic", "values[rows, column] = scores.view(-1, copies).mean(dim=1).where(judged, math.nan)",
     "values[rows, column] = scores.view(-1, copies).mean(dim=1)", "brought::values_are_those_of_what_was_judged"),

    (26, "dpo", "loss, opposite = preference_loss(chosen, rejected), preference_loss(rejected, chosen)",
     "loss, opposite = preference_loss(rejected, chosen), preference_loss(chosen, rejected)",
     "dpo::loss_and_gradient_of_two_pairs_by_hand[0.0]"),
    (26, "dpo", "return (1 - label_smoothing) * loss + label_smoothing * opposite",
     "return (1 - label_smoothing) * loss - label_smoothing * opposite",
     "dpo::loss_and_gradient_of_two_pairs_by_hand[0.2]"),
    (26, "dpo", "return self.beta * (logprobs - ref_logprobs).sum(dim=1)",
     "return self.beta * (logprobs - ref_logprobs).sum(dim=1)" + PROMPT_COUNTED,
     "dpo::it_is_the_sum_over_the_completion_and_the_prompt_does_not_count"),
    (26, "dpo", "return self.beta * (logprobs - ref_logprobs).sum(dim=1)",
     "return self.beta * logprobs.sum(dim=1)",
     "dpo::at_the_start_nothing_is_preferred"),
    (26, "reward_model", "texts = [row[side] for row in batch for side in SIDES]",
     "texts = [row[side] for row in batch for side in reversed(SIDES)]",
     "dpo::the_stage_s_loss_and_gradient_are_eq_7"),
    (26, "reward_model", "texts = [row[side] for row in batch for side in SIDES]",
     'texts = [row["prompt"] + row[side] for row in batch for side in SIDES]',
     "dpo::the_stage_s_loss_and_gradient_are_eq_7"),
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
    module = importlib.import_module(f"grpo_min.{mutant.file}".replace("/", "."))
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
