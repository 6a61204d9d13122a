const LOST_MS = 300; // a message that has not come by then
const SLIDERS = [
  ["temperature", "range", 0, 2, 0.05],
  ["top_p", "range", 0.01, 1, 0.01],
  ["min_p", "range", 0, 1, 0.01],
  ["top_k", "number", 0, 1e6, 1],
  ["max_tokens", "number", 0, 1e6, 1],
  ["seed", "number", 0, 2 ** 53, 1],
];

/** The parameters; each move is one message to the kernel. */
function sliderRow(model) {
  const inputs = SLIDERS.map(([name, type, min, max, step]) =>
    make("input", "", { name, type, min, max, step, placeholder: "random" }),
  );
  const labels = inputs.map((input) =>
    make("label", "slider", {}, input.name, input, make("output", "muted")),
  );
  const el = make("div", "row sliders", { oninput }, ...labels);
  function oninput({ target: { name, value } }) {
    const number = value === "" ? (name === "seed" ? null : 0) : Number(value);
    model.set("values", { ...model.get("values"), [name]: number });
    model.save_changes();
  }
  function update() {
    const values = model.get("values");
    for (const input of inputs) {
      const value = String(values[input.name] ?? "");
      if (Number(input.value) !== Number(value) || !input.value) input.value = value;
      const isIdle = values.temperature === 0 && !/^(temp|max)/.test(input.name);
      input.disabled = isIdle;
      input.title = isIdle ? "no effect at temperature 0" : "";
      if (input.type === "range") input.nextSibling.value = Number(value).toFixed(2);
    }
  }
  return { el, update };
}

/** The prompt, or the messages of a conversation. */
function promptEditor(model) {
  const isChat = model.get("is_chat");
  const add = make("button", "button", { onclick: addRow }, "+ message");
  const first = isChat ? add : field(model.get("prompt"), "prompt");
  const el = make("div", "", { oninput: change }, first);
  function field(value, ariaLabel) {
    return make("textarea", "input", { rows: 2, ariaLabel, value });
  }
  function read() {
    return [...el.querySelectorAll(".nbllm-message")].map(({ children: [role, content] }) => ({
      role: role.value,
      content: content.value,
    }));
  }
  function change() {
    if (isChat) model.set("messages", read());
    else model.set("prompt", first.value);
    if (model.get("live")) model.save_changes(); // else it goes with Run
  }
  function row({ role, content }) {
    const select = make("select", "input", { ariaLabel: "role" });
    for (const name of new Set(["system", "user", "assistant", role])) select.add(new Option(name));
    select.value = role;
    const remove = make("button", "button", { ariaLabel: "remove message", onclick }, "✕");
    function onclick() {
      remove.parentElement.remove();
      change();
    }
    return make("div", "message", {}, select, field(content, "message"), remove);
  }
  function addRow() {
    add.before(row({ role: "user", content: "" }));
    change();
  }
  function update() {
    const messages = model.get("messages");
    if (!isChat) {
      if (first.value !== model.get("prompt")) first.value = model.get("prompt");
    } else if (JSON.stringify(read()) !== JSON.stringify(messages)) {
      el.replaceChildren(...messages.map(row), add);
      if (el.isConnected && messages.length) add.previousSibling.children[1].focus();
    }
  }
  return { el, update };
}

function toggle(model, name, text) {
  const box = make("input", "", { type: "checkbox", onchange });
  function onchange() {
    model.set(name, box.checked);
    model.save_changes();
  }
  const update = () => (box.checked = model.get(name));
  return { el: make("label", "slider", {}, box, text), update };
}

function render({ model, el }) {
  const colors = model.get("colors");
  const send = (message) => model.send(message);
  const button = (text, title, onclick) => make("button", "button", { title, onclick }, text);
  const run = button("Run", "Ctrl+Enter", () => {
    const inputs = ["prompt", "messages", "values"].map((name) => [name, model.get(name)]);
    send({ type: "run", ...Object.fromEntries(inputs) });
  });
  run.classList.add("nbllm-primary");
  const stop = button("Stop", "Esc", () => send({ type: "stop" }));
  const reply = button("Reply", "next message", () => send({ type: "reply" }));
  const problem = make("div", "problem", { role: "alert" });
  const prompt = promptEditor(model);
  const sliders = sliderRow(model);
  const live = toggle(model, "live", "live");
  const numbers = toggle(model, "is_numeric", "numbers");
  const steps = colors.map(([least, background]) => {
    const step = make("span", "step", { title: `from ${100 * least} %` });
    step.style.background = background;
    return step;
  });
  const legend = make("span", "row muted legend", {}, "likely", ...steps, "less");
  const name = make("span", "muted", {}, model.get("model_name"));
  const lanes = model.get("state").lanes.map((_, index) => laneView(index, colors, send));
  const grid = make("div", "lanes", {}, ...lanes.map((lane) => lane.el));
  const bar = make("div", "row", {}, run, stop, reply, live.el, numbers.el, legend, name);
  const panel = make("div", "panel playground", {}, prompt.el, sliders.el, bar, problem, grid);
  panel.dataset.lmSuppressShortcuts = "true"; // of JupyterLab, which would move between cells
  let seq = -1;
  let early = []; // messages that have overtaken the state before them, or one that got lost
  let timer;

  function onState() {
    const state = model.get("state");
    if (state.seq <= seq) return;
    const whole = state.anew || state.seq !== seq + 1;
    seq = state.seq;
    state.lanes.forEach((lane, index) => lanes[index].update(lane, whole));
    stop.disabled = !state.running;
    reply.hidden = !model.get("is_chat") || state.running || !state.lanes[0].tokens.length;
    takeEarly();
  }

  function takeEarly() {
    early = early.filter((message) => {
      if (message.seq !== seq + 1) return message.seq > seq;
      seq += 1;
      message.lanes.forEach((news) => lanes[news.lane].push(news));
    });
    if (early.length) timer ??= setTimeout(send, LOST_MS, { type: "sync" });
    else timer = clearTimeout(timer);
  }

  function onMessage(message) {
    early.push(message);
    takeEarly();
  }

  panel.onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run.click();
    else if (event.key === "Escape" && !stop.disabled) stop.click();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const handlers = {
    state: onState,
    values: sliders.update,
    prompt: prompt.update,
    messages: prompt.update,
    live: live.update,
    is_numeric: () => panel.classList.toggle("nbllm-numeric", numbers.update()),
    error: () => (problem.textContent = model.get("error")),
  };
  for (const [name, handler] of Object.entries(handlers)) {
    model.on(`change:${name}`, handler);
    handler();
  }
  model.on("msg:custom", onMessage);
  el.append(panel);
  return () => {
    for (const [name, handler] of Object.entries(handlers)) model.off(`change:${name}`, handler);
    model.off("msg:custom", onMessage);
    clearTimeout(timer);
    panel.remove();
  };
}

export default { render };
