// The page of a run. `journal/page.py` writes what it shows, as JSON, into the page itself.
"use strict";

(() => {
  const run = JSON.parse(document.getElementById("data").textContent);
  const at = id => document.getElementById(id);
  const { figures, make } = Elements;
  const { seconds, bytes, percent } = Units;
  const FORMATS = { seconds, bytes, share: percent };
  const BILL = { compute: "#4f8fc4", schedule: "#cfcfcf", imbalance: "#e0a84f", transfer: "#9b6bc2", host: "#8d99a6", update: "#5aa57f" };
  const TOLD = {
    compute: "forwards and backwards",
    schedule: "waiting that the schedule asks for even of equal stages",
    imbalance: "waiting beyond that: stages take longer than others",
    transfer: "sending, and waiting for what was made",
    host: "all else that the process did",
    update: "gradients put together, the optimizer's step",
  };

  function table(headings, rows) {
    const cell = (tag, [content, number]) => make(tag, { className: number ? "number" : "" }, content);
    return make("table", {},
      make("thead", {}, make("tr", {}, ...headings.map(each => cell("th", each)))),
      make("tbody", {}, ...rows.map(row => make("tr", {}, ...row.map((each, place) => cell("td", [each, headings[place][1]]))))));
  }

  function header() {
    document.querySelector("h1").textContent = run.name;
    document.querySelector("header .soft").textContent = run.about;
    document.querySelector(".figures").append(...figures(run.figures));
  }

  function bill() {
    const names = Object.keys(BILL);
    const total = each => names.reduce((sum, name) => sum + Math.max(0, each[name]), 0);
    const longest = Math.max(...["predicted", "measured"].flatMap(which => run.bills[which].map(total)));
    const row = (each, label, thin) => make("div", { className: thin ? "row thin" : "row" },
      make("span", {}, label),
      make("div", { className: "stack" }, ...names.filter(name => each[name] > 0).map(name => {
        const share = each[name] / longest;
        return make("div", { title: `${name}: ${seconds(each[name])} (${TOLD[name]})`,
          style: { width: `${100 * share}%`, background: BILL[name] } }, share > 0.06 ? seconds(each[name]) : "");
      })),
      make("span", {}, seconds(total(each))));
    const legend = make("p", {}, ...names.map(name => make("span", { className: "entry" },
      make("i", { style: { background: BILL[name] } }), name, make("span", { className: "soft" }, ` ${TOLD[name]}`))));
    at("bill").append(legend);
    run.bills.measured.forEach((each, rank) => {
      const who = run.bills.measured.length > 1 ? `rank ${rank}` : "the process";
      at("bill").append(row(each, who, false), row(run.bills.predicted[rank], "predicted", true));
    });
  }

  function cut() {
    const sent = stage => run.timeline.edges.filter(edge => edge.source === stage && edge.num_bytes)
      .map(edge => `${bytes(edge.num_bytes)} in ${edge.num_tensors} to ${edge.target}${edge.payload === "B" ? " (gradients)" : ""}`);
    const modules = names => names.length > 14
      ? `${names.slice(0, 7).join(", ")}, … (${names.length - 12} more) …, ${names.slice(-5).join(", ")}` : names.join(", ");
    const most = Math.max(...run.cut.map(stage => stage.share));
    at("cut").append(table(
      [["stage", true], ["rank", true], ["modules"], ["nodes", true], ["parameters", true], ["share of work"], ["forward", true],
        ["backward", true], ["sends for each microbatch"]],
      run.cut.map((stage, number) => [
        `${number}`, `${stage.rank}`, make("span", { title: stage.modules.join("\n") }, modules(stage.modules)), `${stage.num_nodes}`,
        stage.num_parameters.toLocaleString("en"),
        make("span", { style: { whiteSpace: "nowrap" } }, make("span", { className: "share", style: { width: `${Math.round(70 * stage.share / most)}px` } }), percent(stage.share)),
        seconds(stage.forward), stage.backward === null ? "-" : seconds(stage.backward), sent(number).join("; ") || "-"])));
  }

  function beside() {
    if (!run.beside.length) {
      at("beside-title").hidden = true;
      return;
    }
    at("beside").append(table(
      [["what"], ["planned", true], ["measured", true], ["±", true]],
      run.beside.map(({ what, planned, measured, unit }) => {
        const off = planned ? measured / planned - 1 : null;
        const share = off === null || unit === "share" ? "" : `${off >= 0 ? "+" : ""}${(100 * off).toFixed(1)} %`;
        return [what, FORMATS[unit](planned), FORMATS[unit](measured),
          make("span", { className: share && Math.abs(off) > 0.1 ? "off" : "" }, share)];
      })));
  }

  function mean(values, width) {
    let sum = 0, number = 0;
    return values.map((value, place) => {
      if (value !== null) [sum, number] = [sum + value, number + 1];
      const gone = place >= width ? values[place - width] : null;
      if (gone !== null) [sum, number] = [sum - gone, number - 1];
      return number ? sum / number : null;
    });
  }

  function curves() {
    const { number, loss, per_second: rate } = run.steps;
    const width = Math.max(1, Math.min(20, Math.floor(number.length / 10)));
    for (const [name, values] of [["loss", loss], [`${run.item}/s`, rate]]) {
      const place = make("div", {}, make("div", {}, make("b", {}, name),
        make("span", { className: "soft" }, width > 1 ? `  each step, and the mean of ${width}` : "")));
      at("curves").append(place);
      const size = () => ({ width: Math.max(300, place.clientWidth - 4), height: 230 });
      const chart = new uPlot({
        ...size(),
        scales: { x: { time: false } },
        legend: { live: true },
        axes: [{ label: "step", grid: { stroke: "#f0f0f0" } }, { size: 64, grid: { stroke: "#f0f0f0" } }],
        series: [{ label: "step" }, { label: name, stroke: "#9cc3e5", width: 1, points: { show: number.length < 3 } },
          { label: "mean", stroke: "#0b5394", width: 2, points: { show: false } }],
      }, [number, values, mean(values, width)], place);
      chart.setLegend({ idx: number.length - 1 });
      new ResizeObserver(() => { if (chart.width !== size().width) chart.setSize(size()); }).observe(place);
    }
  }

  header();
  window.drawn = new Timeline(at("timeline"), run.timeline);
  bill();
  cut();
  beside();
  curves();
})();
