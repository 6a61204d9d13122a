const DASHBOARD_COLUMNS = [
  ["id", "Request"],
  ["source", "From"],
  ["status", "State"],
  ["prompt", "Prompt"],
  ["generated", "Generated"],
  ["age", "Age"],
  ["pages", "Pages"],
];

/** An element with a class and a text. */
function dashboardNode(tag, name, text = "") {
  const node = document.createElement(tag);
  node.className = name.split(" ").map((part) => `nbllm-${part}`).join(" ");
  node.textContent = text;
  return node;
}

/** A number of the engine with its heading; those with a column of the curve have one below. */
function dashboardTile(heading, column) {
  const root = dashboardNode("div", "dashboard-tile");
  const value = dashboardNode("span", "dashboard-value");
  const note = dashboardNode("span", "muted");
  const line = dashboardNode("div", "dashboard-number");
  line.append(value, note);
  root.append(dashboardNode("div", "muted", heading), line);
  const paths = [];
  if (column) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("class", "nbllm-dashboard-curve");
    svg.setAttribute("viewBox", "0 0 100 24");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true"); // the number beside it says it
    for (const name of ["area", "line"]) {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("class", `nbllm-dashboard-${name}`);
      svg.append(path);
      paths.push(path);
    }
    root.append(svg);
  }
  return {
    root,
    show(text, small, state) {
      value.textContent = text;
      note.textContent = small;
      paths.forEach((path, index) => path.setAttribute("d", dashboardPaths(state, column)[index]));
    },
  };
}

/** The curve of the last minute, the newest at the right: the area below it and the line. */
function dashboardPaths(state, column) {
  const top = Math.max(...state.curve.map((point) => point[column]), 0) || 1;
  const points = state.curve.map((point) => {
    const x = 100 * Math.max(1 - point[0] / state.window_s, 0);
    return [x.toFixed(2), (23 - 22 * (point[column] / top)).toFixed(2)];
  });
  if (!points.length) return ["", ""];
  const line = points.map(([x, y]) => `${x} ${y}`).join("L");
  return [`M${points[0][0]} 23L${line}L${points.at(-1)[0]} 23Z`, `M${line}`];
}

/** The pages of the KV cache as a bar, with a legend. */
function dashboardPages() {
  const root = dashboardNode("div", "dashboard-pages");
  const head = dashboardNode("div", "dashboard-legend");
  const bar = dashboardNode("div", "dashboard-bar");
  bar.setAttribute("role", "img");
  const parts = ["used", "cached", "free"].map((kind) => {
    const part = dashboardNode("div", `dashboard-${kind}`);
    const label = dashboardNode("span", "dashboard-key");
    const text = document.createElement("span");
    label.append(dashboardNode("i", `dashboard-${kind}`), text);
    bar.append(part);
    head.append(label);
    return { kind, part, text };
  });
  const total = dashboardNode("span", "muted dashboard-total");
  head.prepend(dashboardNode("span", "label", "KV cache"));
  head.append(total);
  root.append(head, bar);
  const show = (state) => {
    const used = state.num_used_blocks, cached = state.num_cached_blocks;
    const counts = { used, cached, free: state.num_blocks - used - cached };
    for (const { kind, part, text } of parts) {
      part.style.flexGrow = counts[kind];
      text.textContent = `${counts[kind].toLocaleString("en")} ${kind}`;
    }
    total.textContent =
      `${state.num_blocks.toLocaleString("en")} pages of ${state.block_size} tokens`;
    bar.setAttribute("aria-label", `${head.textContent}`);
  };
  return { root, show };
}

/** The table of requests; its rows are kept and filled anew. */
function dashboardTable() {
  const root = dashboardNode("div", "dashboard-requests");
  const caption = dashboardNode("caption", "label");
  const table = document.createElement("table");
  const body = document.createElement("tbody");
  const head = document.createElement("thead");
  const headings = document.createElement("tr");
  for (const [name, title] of DASHBOARD_COLUMNS) {
    const cell = dashboardNode("th", `dashboard-cell-${name}`, title);
    cell.scope = "col";
    headings.append(cell);
  }
  head.append(headings);
  table.append(caption, head, body);
  const more = dashboardNode("div", "muted");
  root.append(table, more);
  root.tabIndex = 0; // to be scrolled by keyboard
  root.setAttribute("role", "region");
  root.setAttribute("aria-label", "Requests");
  const show = (state) => {
    const sources = Object.entries(state.num_by_source).sort();
    const counts = sources.map(([source, count]) => `${count.toLocaleString("en")} ${source}`);
    caption.textContent = counts.length ? `Requests: ${counts.join(", ")}` : "No requests";
    head.hidden = !state.requests.length;
    while (body.rows.length > state.requests.length) body.deleteRow(-1);
    state.requests.forEach((request, index) => {
      const row = body.rows[index] ?? body.insertRow();
      row.className = request.status === "waiting" ? "nbllm-muted" : "";
      DASHBOARD_COLUMNS.forEach(([name], column) => {
        const cell = row.cells[column] ?? row.insertCell();
        cell.className = `nbllm-dashboard-cell-${name}`;
        if (cell.textContent !== request[name]) cell.textContent = request[name];
      });
    });
    const total = sources.reduce((sum, [, count]) => sum + count, 0);
    const hidden = total - state.requests.length;
    more.textContent = hidden > 0 ? `and ${hidden.toLocaleString("en")} more` : "";
  };
  return { root, show };
}
