// The playground: asks the server that sent it for the step that its levers describe, and draws the answer.
"use strict";

(() => {
  const { names, first } = JSON.parse(document.getElementById("data").textContent);
  const at = id => document.getElementById(id);
  const levers = at("levers").elements;
  const { percent, seconds } = Units;
  let asked = 0, waiting = null;

  for (const name of names) levers.schedule.append(new Option(name));

  // What is no number goes as it stands: the server says what is wrong with it.
  const value = text => (Number.isFinite(Number(text)) ? Number(text) : text);
  const number = text => (text.trim() === "" ? null : value(text));
  const numbers = text => text.split(/[\s,;]+/).filter(Boolean).map(value);

  function question() {
    return {
      schedule: levers.schedule.value,
      num_ranks: number(levers.num_ranks.value),
      num_microbatches: number(levers.num_microbatches.value),
      stages_per_rank: number(levers.stages_per_rank.value),
      forward_seconds: numbers(levers.forward.value),
      input_grad_seconds: numbers(levers.input_grad.value),
      weight_grad_seconds: numbers(levers.weight_grad.value),
      transfer_seconds: number(levers.transfer_seconds.value),
      cap: number(levers.cap.value),
    };
  }

  function show(answer) {
    at("error").textContent = answer.faults.join("\n");
    at("figures").replaceChildren(...Elements.figures([
      [seconds(answer.makespan), "makespan: first start to last end"],
      [percent(answer.bubble), "of it idle"],
      [seconds(answer.span), "span: the longest rank's busy window"],
      [percent(answer.span_bubble), "of it idle"],
      [answer.peaks.map(peak => +peak.toFixed(2)).join(", "), "microbatches held, at most, by each rank"],
    ]));
    at("bounds").textContent = answer.bounds;
    at("command").textContent = answer.command;
    if (window.drawn) window.drawn.update(answer.timeline);
    else window.drawn = new Timeline(at("timeline"), answer.timeline);
  }

  async function ask() {
    const turn = ++asked;
    document.body.dataset.asked = turn;
    let answer;
    try {
      const reply = await fetch("simulate", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(question()),
      });
      answer = await reply.json();
    } catch {
      answer = { error: "the playground's server does not answer: has `evenflow play` ended?" };
    }
    if (turn !== asked) return;  // another question came since
    if (answer.error) at("error").textContent = answer.error;
    else show(answer);
    document.body.dataset.answered = turn;
  }

  at("levers").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(ask, 120);
  });
  at("levers").addEventListener("submit", event => event.preventDefault());
  for (const [name, value] of Object.entries(first)) levers[name].value = value;
  ask();
})();
