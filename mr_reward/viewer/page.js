"use strict";
const groups = [...document.querySelectorAll(".group")];
function apply() {
  const wanted = location.hash.slice(1) || "all";
  let shown = 0;
  for (const group of groups) {
    const holds = wanted === "all" || group.dataset.filters.split(" ").includes(wanted);
    group.hidden = !holds;
    shown += holds;
  }
  for (const link of document.querySelectorAll(".filter")) link.classList.toggle("on", link.dataset.filter === wanted);
  document.getElementById("none").hidden = shown > 0;
}
addEventListener("hashchange", apply);
const order = document.getElementById("order");
if (order) order.addEventListener("change", () => {
  const key = order.value;
  const parent = groups[0].parentNode;
  [...groups].sort((a, b) => a.dataset[key] - b.dataset[key]).forEach((group) => parent.insertBefore(group, document.getElementById("none")));
});
apply();
