"use strict";
// Pages work without this: it refreshes what has changed, and chooses all keys of a list.
(() => {
  const byId = (name) => document.getElementById(name);

  const chooseAll = byId("choose-all");
  if (chooseAll) {
    chooseAll.hidden = false;
    chooseAll.addEventListener("change", () => {
      for (const box of document.querySelectorAll("input[name=key]")) box.checked = chooseAll.checked;
    });
  }

  const live = byId("live");
  if (!live || !window.EventSource) return;
  const state = byId("live-state"), pause = byId("pause");
  let source = null;

  // What somebody reads with the keyboard or has selected is left alone.
  const isBusy = (part) => {
    const selection = window.getSelection();
    return part.contains(document.activeElement) ||
      (selection && !selection.isCollapsed && part.contains(selection.anchorNode));
  };

  const open = () => {
    source = new EventSource(document.body.dataset.events);
    source.addEventListener("parts", (event) => {
      state.textContent = "live";
      for (const [name, html] of Object.entries(JSON.parse(event.data))) {
        const part = byId(name);
        if (part && !isBusy(part)) part.innerHTML = html;
      }
    });
    source.addEventListener("error", () => {
      // A stream ends after a while, and another begins at once.
      if (source.readyState === EventSource.CLOSED) state.textContent = "not live";
    });
  };

  const close = () => {
    if (source) source.close();
    source = null;
  };

  pause.addEventListener("click", () => {
    if (source) close(); else open();
    pause.textContent = source ? "Pause" : "Go on";
    state.textContent = source ? "live" : "paused";
  });
  // A page in the background asks for nothing.
  document.addEventListener("visibilitychange", () => {
    if (pause.textContent !== "Pause") return;
    if (document.hidden) close(); else if (!source) open();
  });
  live.hidden = false;
  open();
})();
