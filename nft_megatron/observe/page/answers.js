"use strict";
// The viewer of recorded answers: step, then question, then its answers by verdict. All model text goes through textContent.
const FATES = { train: "trained on", surplus: "surplus", sampled: "sampled" };
const LABELS = { correct: "right", wrong: "wrong", unknown: "unknown" };
const viewer = document.querySelector(".viewer");
const stepsWithAnswers = [...new Set(run.groups.map((group) => group.step))];
const shown = { step: 0, group: null, label: "all" };

function rateText(group) {
  const count = (label) => group.answers.filter((answer) => answer.label === label).length;
  return `r̂ = ${count("correct")}/${count("correct") + count("wrong")}`;
}

function meter(group) {
  const bar = html("div", "meter");
  for (const label of Object.keys(LABELS)) {
    group.answers.filter((answer) => answer.label === label).forEach(() => bar.append(html("i", label)));
  }
  return bar;
}

function showStep(index) {
  shown.step = Math.min(Math.max(index, 0), stepsWithAnswers.length - 1);
  const groups = run.groups.filter((group) => group.step === stepsWithAnswers[shown.step]);
  viewer.querySelector("[data-pick]").value = String(shown.step);
  viewer.querySelector('[data-turn="-1"]').disabled = shown.step === 0;
  viewer.querySelector('[data-turn="1"]').disabled = shown.step === stepsWithAnswers.length - 1;
  viewer.querySelector(".questions").replaceChildren(...groups.map((group) => {
    const button = html("button");
    button.type = "button";
    button.append(html("span", "excerpt", group.question), html("span", "rate", rateText(group)), meter(group));
    button.addEventListener("click", () => showGroup(group));
    group.button = button;
    const item = html("li");
    item.append(button);
    return item;
  }));
  showGroup(groups[0]);
}

function showGroup(group) {
  shown.group?.button.removeAttribute("aria-current");
  shown.group = group;
  group.button.setAttribute("aria-current", "true");
  const facts = [`question ${group.question_id}`, rateText(group), group.gold && `reference answer ${group.gold}`, FATES[group.fate]].filter(Boolean);
  viewer.querySelector(".question").replaceChildren(html("p", "meta", facts.join(" · ")), html("pre", "", group.question));
  showAnswers();
}

function showAnswers() {
  const { group, label } = shown;
  const count = (name) => group.answers.filter((answer) => name === "all" || answer.label === name).length;
  viewer.querySelector(".filters").replaceChildren(...["all", ...Object.keys(LABELS)].map((name) => {
    const button = html("button", "", `${LABELS[name] ?? "all"} ${count(name)}`);
    button.type = "button";
    button.setAttribute("aria-pressed", String(name === label));
    button.addEventListener("click", () => { shown.label = name; showAnswers(); });
    return button;
  }));
  const answers = group.answers.filter((answer) => label === "all" || answer.label === label);
  const list = viewer.querySelector(".list");
  list.replaceChildren(...(answers.length ? answers.map(answerCard) : [html("p", "hint", "No answers with this verdict.")]));
  list.querySelectorAll("pre").forEach(fold);
}

function answerCard(answer) {
  const card = html("div", "answer");
  const meta = card.appendChild(html("p", "meta"));
  meta.append(html("span", `badge ${answer.label}`, LABELS[answer.label]), html("span", "", answer.reason));
  meta.append(html("span", "", `${answer.num_tokens} tokens`), html("span", "", `finish: ${answer.finish_reason}`));
  if (isNumber(answer.mean_logprob)) meta.append(html("span", "", `mean log-prob ${answer.mean_logprob.toFixed(3)}`));
  meta.append(html("span", "", `weights of step ${answer.weight_version}`));
  if (answer.cut) meta.append(html("span", "", `${answer.cut} characters cut from the middle`));
  card.append(html("pre", "", answer.text));
  return card;
}

// Long answers start folded.
function fold(text) {
  if (text.scrollHeight < 320) return;
  text.classList.add("folded");
  const button = html("button", "", "Show all");
  button.type = "button";
  button.addEventListener("click", () => { text.classList.remove("folded"); button.remove(); });
  text.after(button);
}

if (run.groups.length) {
  viewer.hidden = false;
  const picker = viewer.querySelector("[data-pick]");
  stepsWithAnswers.forEach((step, i) => { const option = html("option", "", String(step)); option.value = String(i); picker.append(option); });
  picker.addEventListener("change", () => showStep(Number(picker.value)));
  viewer.querySelectorAll("[data-turn]").forEach((button) => button.addEventListener("click", () => showStep(shown.step + Number(button.dataset.turn))));
  showStep(stepsWithAnswers.length - 1);
}
