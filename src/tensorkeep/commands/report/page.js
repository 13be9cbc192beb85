"use strict";
// The pages work without this: it adds the choice of colours, values under the cursor, and runs that can be hidden.

// Light or dark, until the page is closed; without a choice the system's is taken.
const choice = document.getElementById("theme");
if (choice) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const now = () => document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
  const label = () => { choice.textContent = now() === "dark" ? "Light colours" : "Dark colours"; };
  choice.hidden = false;
  label();
  dark.addEventListener("change", label);
  choice.addEventListener("click", () => {
    document.documentElement.dataset.theme = now() === "dark" ? "light" : "dark";
    label();
  });
}

// Arrow keys, Home and End move a position from 0 to last; gives undefined for every other key.
function moved(key, at, last) {
  const step = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[key];
  return step === undefined ? undefined : Math.max(0, Math.min(last, step));
}

function number(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(3) : String(Number(value.toPrecision(5)));
}

// Curves: a line at the step nearest to the pointer, and what every curve that is shown has there.
for (const figure of document.querySelectorAll("figure[data-lines]")) {
  const lines = JSON.parse(figure.dataset.lines);
  const [low, high] = JSON.parse(figure.dataset.steps);
  const plane = figure.querySelector(".plane"), draw = figure.querySelector(".draw");
  const said = figure.querySelector("output"), cursor = figure.querySelector(".cursor");
  const steps = [...new Set(lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  let at = -1;
  const nearest = (points, step) => {
    let best = points[0];
    for (const point of points) if (Math.abs(point[0] - step) < Math.abs(best[0] - step)) best = point;
    return best;
  };
  const show = (index) => {
    at = index;
    const step = steps[at], x = high > low ? (step - low) / (high - low) * 1000 : 500;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.classList.remove("hidden");
    const parts = lines.map((line, index) => {
      const drawn = figure.querySelector(`[data-line="${index}"]`);
      if (!line.points.length || drawn.classList.contains("hidden")) return "";
      const [own, mean, least, most] = nearest(line.points, step);
      if (Math.abs(own - step) > (high - low) / 100 + 1e-9) return "";
      const range = least === undefined || least === most ? "" : ` (${number(least)} to ${number(most)})`;
      return `${lines.length > 1 ? line.label + " " : ""}${number(mean)}${range}`;
    });
    said.textContent = `${figure.dataset.x} ${number(step)}: ${parts.filter(Boolean).join("; ")}`;
  };
  const point = (event) => {
    const box = draw.getBoundingClientRect();
    const step = low + (event.clientX - box.left) / Math.max(box.width, 1) * (high - low);
    let best = 0;
    steps.forEach((other, index) => { if (Math.abs(other - step) < Math.abs(steps[best] - step)) best = index; });
    show(best);
  };
  if (!steps.length) continue;
  plane.addEventListener("pointermove", point);
  plane.addEventListener("pointerdown", point);
  plane.addEventListener("keydown", (event) => {
    const next = moved(event.key, at, steps.length - 1);
    if (next === undefined) return;
    event.preventDefault();
    show(next);
  });
}

// Maps and timelines: what the square or segment under the pointer says; arrow keys go from one to the next.
for (const figure of document.querySelectorAll("figure[data-cells]")) {
  const said = figure.querySelector("output");
  const rows = [...figure.querySelectorAll("svg")]
    .map((svg) => [...svg.querySelectorAll("g")].filter((cell) => cell.querySelector("title")))
    .filter((row) => row.length);
  let row = 0, column = -1;
  const show = (cell) => {
    figure.querySelectorAll(".at").forEach((old) => old.classList.remove("at"));
    cell.querySelector("rect").classList.add("at");
    said.textContent = cell.querySelector("title").textContent;
  };
  figure.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("g");
    if (cell && cell.querySelector("title")) show(cell);
  });
  figure.querySelector("[tabindex]").addEventListener("keydown", (event) => {
    const down = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!rows.length) return;
    if (down !== undefined) row = Math.max(0, Math.min(rows.length - 1, row + down));
    const next = down === undefined ? moved(event.key, column, rows[row].length - 1) : Math.max(column, 0);
    if (next === undefined) return;
    event.preventDefault();
    column = Math.min(next, rows[row].length - 1);
    show(rows[row][column]);
  });
}

// Runs of a comparison that are not wanted.
for (const box of document.querySelectorAll("input[data-run]")) {
  box.addEventListener("change", () => {
    for (const part of document.querySelectorAll(`[data-line="${Number(box.dataset.run)}"]`)) {
      part.classList.toggle("hidden", !box.checked);
    }
  });
}
