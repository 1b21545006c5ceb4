"use strict";
// The charts of the page, in order. A chart without data is left out, and so is a section without charts.
const columnsOf = (name) => Object.keys(run.columns).filter((key) => key.startsWith(name));
const verdictColors = ["blue", "orange", "gray", "aqua", "violet", "yellow", "red"];

new Chart(
  "learning", "Accuracy", "Held-out questions, with the weights after the step; answers sampled in the step, before the prompt filter.",
  [{ label: "held-out", color: "blue", sparse: true, y: steps.map((step) => heldOut.get(step) ?? null) }, column("accuracy", "sampled", "orange")],
  { format: percent, wide: true, height: 280 },
);
new Chart("learning", "Entropy", "Nats per token: exact over trained tokens, estimated over all sampled tokens.", [
  column("entropy", "trained", "blue"), column("entropy_sampled", "sampled", "orange"),
]);
new Chart("learning", "Answer length", "Tokens.", [
  column("answer_length_mean", "mean", "blue"), column("answer_length_p90", "90th percentile", "orange"),
]);

new HeatMap(
  "sampling", "correct_rate_histogram", "Distribution of r̂",
  "All sampled questions by r̂, the share of their answers that are right. Only mixed ones are trained on.", { wide: true, height: 240 },
);
new Chart("sampling", "Questions per step", "Sampled until the quota of mixed questions is met.", [
  column("groups_sampled", "sampled", "gray"), column("groups_mixed", "mixed", "orange"), column("groups_trained", "trained", "blue"),
]);
new Chart("sampling", "Truncated and unknown answers", "Cut at the length limit (counted as wrong); could not be judged (dropped).", [
  column("truncated_rate", "truncated", "orange"), column("unknown_rate", "unknown", "gray"),
], { format: percent });
new StackedChart(
  "sampling", "Reasons for verdicts", "Answers by the reason for their verdict. Reasons that never occur are left out.",
  columnsOf("verdict/").map((name, k) => column(name, name.slice("verdict/".length), verdictColors[k % 7])),
  { format: percent, wide: true, height: 240 },
);

new Chart("optimization", "Loss", "The objective, and what right and wrong answers contribute to it.", [
  column("loss", "loss", "blue"), column("loss_positive", "right answers", "aqua"), column("loss_negative", "wrong answers", "red"),
], { zero: false });
new Chart("optimization", "Gradient norm", "Before clipping, over the updates of the step.", [
  column("grad_norm", "mean", "blue"), column("grad_norm_max", "largest", "orange"),
]);
new Chart("optimization", "KL to the old policy", "Nats per token.", [column("kl_old", "KL", "blue")]);
new Chart("optimization", "Engine vs. trainer", "|Δ log-prob| of trained tokens under the same weights, nats.", [
  column("mismatch_mean", "mean", "blue"), column("mismatch_max", "largest", "orange"),
]);
new Chart("optimization", "Largest likelihood ratio", "R = π⁺ / π over the trained tokens of the step.", [column("ratio_max", "largest R", "blue")]);
new Chart("optimization", "Clamped tokens", "Tokens of wrong answers whose ratio was raised to ε; about half at ε = 1.", [
  column("clamp_rate", "clamped", "blue"),
], { format: percent });
// One series for each range of r̂ that the run has numbers of: hard questions first.
const byRate = (name) => columnsOf(`${name}/`).sort().map((key) => {
  const range = key.slice(name.length + 1);
  return column(key, `r̂ ${range.replace("-", "–")}`, ["violet", "blue", "aqua", "yellow", "orange"][Math.round(5 * parseFloat(range))]);
});
new Chart("optimization", "Clamped tokens by r̂", "The same, by the share of right answers to the question.", byRate("clamp_rate"), { format: percent });
new Chart(
  "optimization", "Implicit negative ratio by r̂", "Mean of (1 − r̂R) / (1 − r̂) over tokens of wrong answers; 1 where nothing has changed.",
  byRate("negative_ratio"), { zero: false },
);
new StackedChart("optimization", "Gradient by r̂", "Share of Σ |∂loss / ∂log π| over the tokens of the step.", byRate("gradient_share"), { format: percent });
new Chart("optimization", "Right vs. wrong answers", "Cosine between their gradients; −1: they pull in opposite directions.", [
  column("gradient_cosine", "cosine", "blue", true),
]);
new Chart("optimization", "Learning rate", "Of the last update of the step.", [column("learning_rate", "learning rate", "blue")]);

new StackedChart("time", "Time per rollout step", "Seconds by phase.", [
  column("time/generate", "generate", "blue"), column("time/verify", "verify", "aqua"), column("time/prepare", "old log-probs", "violet"),
  column("time/update", "update", "orange"), column("time/evaluate", "held-out evaluation", "yellow"), column("time/rest", "everything else", "gray"),
], { format: seconds, wide: true, height: 260 });
new Chart("time", "Generation", "Tokens per second.", [column("tokens_per_second/generate", "tokens/s", "blue")]);
new Chart("time", "Updates", "Trained tokens per second.", [column("tokens_per_second/update", "tokens/s", "orange")]);
new Chart("time", "Async collector", "Seconds spent collecting the step's answers during earlier training, and waiting for new weights before that.", [
  column("ahead/collect", "collecting", "blue"), column("ahead/wait", "waiting", "gray"),
], { format: seconds });

// Of the fleet: the whole, and a line for each server while they can be told apart.
const servers = [...new Set(columnsOf("server/").map((name) => name.split("/")[1]))].sort().slice(0, 8);
const ofServers = (field) => servers.map((name, k) => column(
  `server/${name}/${field}`, name, ["blue", "orange", "aqua", "violet", "yellow", "red", "gray", "ink-2"][k],
));
new Chart(
  "fleet", "Tokens per server", "Tokens per second over the whole step; of more than eight servers, the first eight.", ofServers("tokens_per_second"),
  { wide: true, height: 240 },
);
new Chart("fleet", "Whole fleet", "Tokens per second over the whole step.", [column("fleet/tokens_per_second", "tokens/s", "blue")]);
new Chart("fleet", "Idle", "Share of the step in which a server had nothing to generate.", [
  ...ofServers("idle_share"), column("fleet/idle_share", "all", "ink"),
], { format: percent });
new Chart("fleet", "Queue", "Answers that a server had to generate, averaged over the step.", ofServers("queue"));
new Chart("fleet", "Waste", "Tokens that were generated and not used.", [...ofServers("wasted_tokens"), column("fleet/wasted_tokens", "all", "ink")]);
new Chart("fleet", "Servers", "Healthy at the end of the step; restarts and retried answers up to then.", [
  column("fleet/healthy", "healthy", "blue"), column("fleet/restarts", "restarts", "orange"), column("fleet/retries", "retries", "red"),
]);
new Chart("fleet", "Weight sync", "Seconds until a server has the new weights.", [
  ...ofServers("sync_seconds"), column("fleet/sync_seconds", "slowest", "ink"),
], { format: seconds });
new Chart("fleet", "Log-prob probe", "|Δ log-prob| between engine and trainer on fixed questions after each sync, nats.", [
  column("gate_mean", "mean", "blue"), column("gate_max", "largest", "orange"),
]);
showCharts();
