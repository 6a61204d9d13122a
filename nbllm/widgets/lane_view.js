/**
 * One text of a playground: heading, tokens, branches, and an editor to go on from another text.
 * @param {number} lane its index
 * @param {[number, string, string][]} colors see `tokenView`
 * @param {(message: object) => void} send to the kernel
 */
function laneView(lane, colors, send) {
  const view = tokenView(colors, (index, id) => send({ type: "branch", lane, index, token_id: id }));
  const title = make("strong");
  const stats = make("span", "muted stats");
  const gap = make("span", "muted gap");
  const problem = make("div", "problem", { role: "alert" });
  const open = make("button", "button edit", { onclick: () => edit(true) }, "Edit text");
  const area = make("textarea", "input", { ariaLabel: "new text", rows: 4, onkeydown: onKey });
  const go = make("button", "button primary", { onclick: sendText }, "Continue");
  const back = make("button", "button", { onclick: () => edit(false) }, "Cancel");
  const editor = make("div", "editor", { hidden: true }, area, make("div", "row", {}, go, back));
  const summary = make("summary");
  const list = make("ul");
  const branches = make("details", "branches", {}, summary, list);
  const heading = make("div", "row", {}, title, stats, gap, open);
  const el = make("section", "lane", {}, heading, problem, view.el, editor, branches);
  let isStale = false; // what is shown from some token on is of the text before

  function edit(isOpen) {
    area.value = view.tokens.map(([text, , , special]) => (special ? "" : text)).join("");
    editor.hidden = !isOpen;
    view.el.hidden = isOpen;
    (isOpen ? area : open).focus();
  }

  function showStats({ ttft_ms: first, tokens_per_s: rate, cached, finish, seed }, status = "") {
    const parts = [
      first && `first token ${first.toFixed(0)} ms`,
      rate && `${rate.toFixed(0)} tokens/s`,
      cached && `${cached} cached`,
      finish ?? (status === "stopped" && status),
    ];
    stats.textContent = parts.filter(Boolean).join(" · ");
    stats.title = seed === undefined ? "" : `seed ${seed}`;
  }

  function showParting(diverges) {
    view.part(diverges?.index ?? Infinity);
    gap.textContent = diverges ? `differs from token ${diverges.index + 1}` : "";
    if (diverges?.gap != null) gap.append(` (gap ${diverges.gap.toFixed(2)})`);
  }

  function branch([node, , depth, text, isCurrent]) {
    const onclick = () => send({ type: "select", lane, node });
    const button = make("button", "branch", { ariaCurrent: isCurrent, onclick }, visible(text));
    button.style.paddingLeft = `${8 + 16 * depth}px`;
    return make("li", "", {}, button);
  }

  /** Show the state of the lane; its tokens, too, if `whole`. */
  function update(state, whole) {
    const isRunning = state.status === "running";
    const isBegun = state.tokens.every(([, , id], at) => view.tokens[at]?.[2] === id);
    if (isRunning && isBegun && whole) {
      // The text before stays, pale, until there is a word of the new one: it does not flicker.
      isStale = state.tokens.length < view.tokens.length;
      view.el.style.minHeight = `${view.el.offsetHeight}px`;
    } else if (whole || isStale) {
      view.cut(0);
      view.append(state.tokens);
      isStale = false;
    }
    if (!isRunning) view.el.style.minHeight = "";
    view.list.classList.toggle("nbllm-stale", isStale);
    title.textContent = state.title;
    title.hidden = !state.title;
    el.ariaLabel = state.title || "text";
    problem.textContent = state.error;
    showParting(isStale ? null : state.diverges);
    showStats(state.stats, state.status);
    branches.hidden = state.branches.length < 2;
    summary.textContent = `${state.branches.length} branches`;
    list.replaceChildren(...state.branches.map(branch));
    open.hidden = !state.tokens.length;
    if (isRunning && !editor.hidden) edit(false);
  }

  /** Add new tokens, in the place of those that were there before. */
  function push(news) {
    view.cut(news.start);
    view.append(news.tokens);
    isStale = false;
    view.list.classList.remove("nbllm-stale");
    showParting(news.diverges);
    showStats(news.stats);
  }

  function sendText() {
    send({ type: "edit", lane, text: area.value });
    edit(false);
  }

  function onKey(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) sendText();
    else if (event.key === "Escape") edit(false);
    else return;
    event.stopPropagation();
  }

  return { el, update, push };
}
