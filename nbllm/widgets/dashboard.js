function renderDashboard(model, el) {
  const view = String(Math.random()).slice(2);
  const root = dashboardNode("div", "panel dashboard");
  const status = dashboardNode("span", "dashboard-status");
  status.setAttribute("role", "status");
  const pause = dashboardNode("button", "button");
  pause.type = "button";
  const title = dashboardNode("span", "label dashboard-title");
  const head = dashboardNode("div", "row");
  head.append(title, status, pause);
  const error = dashboardNode("div", "dashboard-error");
  error.setAttribute("role", "alert");
  const tiles = {
    running: dashboardTile("Running"),
    waiting: dashboardTile("Waiting"),
    generated: dashboardTile("Generated", 2),
    prompts: dashboardTile("Prompts", 1),
    hits: dashboardTile("Prefix hits"),
    preemptions: dashboardTile("Preemptions"),
  };
  const grid = dashboardNode("div", "dashboard-tiles");
  grid.append(...Object.values(tiles).map((tile) => tile.root));
  const pages = dashboardPages(), table = dashboardTable();
  const seen = dashboardNode("div", "dashboard-seen");
  seen.append(grid, pages.root, table.root);
  root.append(head, error, seen);
  el.append(root);

  const number = (value) => Math.round(value).toLocaleString("en");
  const percent = (share) => (share === null ? "–" : `${Math.round(100 * share)}%`);
  const showState = () => {
    const state = model.get("state");
    seen.hidden = !state.curve;
    if (!state.curve) return;
    tiles.running.show(number(state.num_running), `of ${number(state.max_num_seqs)}`);
    tiles.waiting.show(number(state.num_waiting), "");
    tiles.generated.show(number(state.generation_rate), "tokens/s", state);
    tiles.prompts.show(number(state.prompt_rate), "tokens/s", state);
    const total = state.total_prefix_hit_share;
    tiles.hits.show(
      percent(state.prefix_hit_share), total === null ? "" : `${percent(total)} in all`);
    const recent = state.num_recent_preemptions;
    tiles.preemptions.show(number(state.num_preemptions), recent ? `${number(recent)} lately` : "");
    pages.show(state);
    table.show(state);
  };
  const showStatus = () => {
    const isPaused = model.get("is_paused"), kind = model.get("status");
    const isOver = kind === "closed" || kind === "failed";
    const shown = isPaused && !isOver ? "paused" : kind;
    if (status.textContent !== shown) status.textContent = shown;
    status.dataset.status = shown;
    root.classList.toggle("nbllm-dashboard-still", shown === "paused" || isOver);
    title.textContent = model.get("model_name");
    error.textContent = model.get("error");
    pause.textContent = isPaused ? "Resume" : "Pause";
    pause.hidden = isOver;
  };
  const names = ["is_paused", "status", "error", "model_name"];
  model.on("change:state", showState);
  for (const name of names) model.on(`change:${name}`, showStatus);
  pause.addEventListener("click", () => {
    model.set("is_paused", !model.get("is_paused"));
    model.save_changes();
  });
  showStatus();
  showState();
  model.send({ type: "open", view });
  return () => {
    model.off("change:state", showState);
    for (const name of names) model.off(`change:${name}`, showStatus);
    root.remove();
    try {
      model.send({ type: "close", view });
    } catch {
      // The kernel is gone, or the widget is closed: nobody looks any more.
    }
  };
}

export default {
  render({ model, el }) {
    return renderDashboard(model, el);
  },
};
