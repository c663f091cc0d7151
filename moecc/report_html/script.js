"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// Graphs: a place is the keys of the groups that were opened, the same on both sides.
const separator = "\u0000";
const walks = data.walk.map((one) => ({
  before: new Map(one.before.views.map(([place, view]) => [place.join(separator), view])),
  after: new Map(one.after.views.map(([place, view]) => [place.join(separator), view])),
  place: one.before.focus.length ? one.before.focus : one.after.focus,
}));

function reach(views, place) {
  let known = place.length;
  while (!views.has(place.slice(0, known).join(separator))) known -= 1;
  return place.slice(0, known);
}

function show(pass, place) {
  const pane = document.querySelector(`[data-pane="${pass}"]`);
  const walk = walks[pass];
  walk.place = place;
  const shown = new Set();
  for (const side of pane.querySelectorAll(".side")) {
    const views = walk[side.dataset.side];
    const at = reach(views, place);
    const view = views.get(at.join(separator));
    const again = shown.has(view) ? "nothing changed here" : "";
    shown.add(view);
    const picture = document.getElementById(`picture-${view}`);
    const stage = side.querySelector(".stage");
    stage.replaceChildren(picture.content.cloneNode(true));
    stage.scrollTo((stage.scrollWidth - stage.clientWidth) / 2, 0);
    side.querySelector("em").textContent = at.length < place.length
      ? `${place.slice(at.length).join(" › ")} is not there: ${at.at(-1) || "the graph"}` : again;
  }
  const crumbs = pane.querySelector(".crumbs");
  crumbs.replaceChildren(...["graph", ...place].flatMap((name, depth) => {
    const button = document.createElement("button");
    button.textContent = name;
    button.disabled = depth === place.length;
    button.onclick = () => show(pass, place.slice(0, depth));
    return depth ? ["›", button] : [button];
  }));
}

function choose(box) {
  const pane = box.closest(".pane");
  const pass = Number(pane.dataset.pane);
  if (box.dataset.open !== undefined) {
    const side = box.closest(".side").dataset.side;
    show(pass, [...reach(walks[pass][side], walks[pass].place), box.dataset.open]);
  }
  pane.querySelector(".chosen").textContent = box.dataset.text;
  for (const other of pane.querySelectorAll("g.on")) other.classList.remove("on");
  if (box.isConnected) box.classList.add("on");
}

for (const pane of document.querySelectorAll(".pane")) {
  pane.addEventListener("click", (event) => {
    const box = event.target.closest("svg.graph g");
    if (box) choose(box);
  });
  pane.addEventListener("keydown", (event) => {
    const box = event.target.closest("svg.graph g");
    if (box && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      choose(box);
    }
  });
}

const tabs = [...document.querySelectorAll("[data-pass]")];
function turn(pass) {
  for (const tab of tabs) tab.setAttribute("aria-selected", Number(tab.dataset.pass) === pass);
  for (const pane of document.querySelectorAll(".pane")) {
    pane.hidden = Number(pane.dataset.pane) !== pass;
  }
  show(pass, walks[pass].place);
}
for (const tab of tabs) tab.onclick = () => turn(Number(tab.dataset.pass));
if (tabs.length) turn(0);

// The heatmap: the cell under the pointer.
const heat = document.getElementById("heat");
if (heat) {
  heat.addEventListener("pointermove", (event) => {
    const edge = heat.getBoundingClientRect();
    const { left, top, cell, row } = heat.dataset;
    const expert = Math.floor((event.clientX - edge.left - left) / cell);
    const block = Math.floor((event.clientY - edge.top - top) / row);
    const load = data.loads[block]?.[expert];
    document.getElementById("heat-cell").textContent =
      load === undefined ? "" : `${data.names[block]}, expert ${expert}: ${load}`;
  });
}
