// Saves clicks; every page works without it.
"use strict";

const form = document.getElementById("chosen");
if (form) {
  const boxes = [...form.querySelectorAll(".gallery input[type=checkbox]")];
  const all = form.querySelector("[data-all]");
  const box = all?.querySelector("input");
  const count = form.querySelector("[data-count]");
  const buttons = [...form.querySelectorAll(".actions button:not([data-always])")];
  const show = () => {
    const n = boxes.filter((b) => b.checked).length;
    count.textContent = n ? `${n} chosen` : count.dataset.count;
    if (box) {
      box.checked = n === boxes.length;
      box.indeterminate = n > 0 && n < boxes.length;
    }
    for (const b of buttons) b.disabled = n === 0;
  };
  if (box) {
    all.hidden = false;
    box.addEventListener("change", () => { for (const b of boxes) b.checked = box.checked; show(); });
  }
  let last = null;
  for (const b of boxes) {
    b.addEventListener("click", (event) => {
      if (event.shiftKey && last !== null) {
        const [from, to] = [boxes.indexOf(last), boxes.indexOf(b)].sort((x, y) => x - y);
        for (const other of boxes.slice(from, to + 1)) other.checked = b.checked;
      }
      last = b;
      show();
    });
    b.addEventListener("change", show);
  }
  window.addEventListener("pageshow", show);
  show();
}

// What goes on: the server's HTML for it again, every second, until it says that it is over.
const live = document.querySelector("[data-live]");
if (live) {
  const look = async () => {
    try {
      const answer = await fetch(live.dataset.live);
      if (answer.ok) {
        const text = await answer.text();
        if (text !== live.dataset.text) {
          live.dataset.text = text;
          const open = live.querySelector("details")?.open;
          live.innerHTML = text;
          const details = live.querySelector("details");
          if (details && open) details.open = true;
        }
        const state = live.querySelector("[data-state]")?.dataset.state;
        if (state === "done" || state === "failed") return;
      }
    } catch { /* the server is being started again: ask later */ }
    setTimeout(look, 1000);
  };
  setTimeout(look, 1000);
}
