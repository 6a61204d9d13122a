// What each control is: name, kind, and for numbers the slider's range and what an empty box says.
const CONTROLS = [
  ["temperature", "slider", { min: 0, max: 2, step: 0.05, most: 1e6 }],
  ["top_p", "slider", { min: 0.01, max: 1, step: 0.01 }],
  ["top_k", "slider", { min: 0, max: 200, step: 1, most: 1e9, note: "0 is all" }],
  ["min_p", "slider", { min: 0, max: 1, step: 0.01 }],
  ["max_tokens", "number", { min: 1, step: 1, empty: "as many as fit" }],
  ["seed", "text", { empty: "drawn anew" }],
];
const MORE_CONTROLS = [
  ["repetition_penalty", "slider", { min: 0.5, max: 2, step: 0.01, most: 1e6, least: 1e-6 }],
  ["presence_penalty", "slider", { min: -2, max: 2, step: 0.05 }],
  ["frequency_penalty", "slider", { min: -2, max: 2, step: 0.05 }],
  ["min_tokens", "number", { min: 0, step: 1 }],
  ["n", "number", { min: 1, step: 1 }],
  ["logprobs", "number", { min: -1, step: 1, empty: "none" }],
  ["stop", "lines", { empty: "one string a line" }],
  ["ignore_eos", "check", {}],
];

/** @param {string} tag @param {object} properties @param {...(Node|string)} children */
function makeElement(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  // Else JupyterLab takes the keys of all that is no text field, the arrows of a slider, too.
  if (/input|textarea|button|summary/.test(tag)) {
    element.setAttribute("data-lm-suppress-shortcuts", "true");
  }
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/**
 * One control: how its value is shown and read, and what is said beside it.
 * @param {[string, string, any]} description
 * @param {(name: string, value: any, isLast: boolean) => void} send
 */
function makeControl([name, kind, options], send) {
  const label = { "aria-label": name };
  const hint = makeElement("span", { className: "nbllm-controls-hint", role: "alert" });
  const inputs = [];
  let isEditing = false;
  if (kind === "lines") {
    inputs.push(makeElement("textarea", { ...label, rows: 2, placeholder: options.empty }));
  } else if (kind === "check") {
    inputs.push(makeElement("input", { ...label, type: "checkbox" }));
  } else {
    const { min = "", max = "", step = "any" } = options;
    if (kind === "slider") {
      inputs.push(
        makeElement("input", { type: "range", min, max, step, "aria-label": `${name}, slider` }),
      );
    }
    const box = kind === "text" ? { type: "text" } : { type: "number", step: "any" };
    if (kind !== "text") Object.assign(box, { min: options.least ?? min, max: options.most ?? max });
    if (kind === "number") box.step = step;
    inputs.push(makeElement("input", { ...label, ...box, placeholder: options.empty ?? "" }));
  }
  const read = (input) => {
    if (kind === "check") return input.checked;
    if (kind === "lines") return input.value.split("\n").filter((line) => line);
    if (kind === "text") return input.value.trim() || null;
    return input.value === "" ? null : Number(input.value);
  };
  const write = (value) => {
    for (const input of inputs) {
      if (kind === "check") input.checked = value;
      else input.value = kind === "lines" ? value.join("\n") : (value ?? "");
    }
  };
  for (const input of inputs) {
    input.addEventListener("input", () => {
      isEditing = true;
      for (const other of inputs) if (other !== input) other.value = input.value;
      send(name, read(input), false);
    });
    input.addEventListener("change", () => {
      isEditing = false;
      send(name, read(input), true);
    });
    input.addEventListener("blur", () => (isEditing = false));
  }
  const title = options.note ? `${name} (${options.note})` : name;
  const field = makeElement(
    "div",
    { className: `nbllm-controls-field nbllm-controls-${kind}` },
    makeElement("span", { className: "nbllm-label", title }, name),
    ...inputs,
    hint,
  );
  const show = (value, error, idle) => {
    if (!isEditing) write(value);
    hint.textContent = error || "";
    field.classList.toggle("nbllm-is-wrong", Boolean(error));
    field.classList.toggle("nbllm-is-idle", Boolean(idle));
    for (const input of inputs) {
      input.disabled = Boolean(idle);
      input.setAttribute("aria-invalid", String(Boolean(error)));
      input.title = error || idle || "";
    }
  };
  return { name, field, show };
}

/** Copy a text, also where the page has no clipboard of its own (plain http). */
async function copyText(text, el) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = makeElement("textarea", { value: text, className: "nbllm-visually-hidden" });
    el.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

/**
 * The controls over a model with the traits of SamplingControls.
 * @param {any} model @param {HTMLElement} el
 * @returns {() => void} takes the listeners away
 */
function renderSamplingControls(model, el) {
  let gesture = Math.floor(Math.random() * 1e9); // not another view's
  const send = (name, value, isLast) => {
    const values = { ...model.get("values"), [name]: value };
    if (JSON.stringify(values) !== JSON.stringify(model.get("values"))) {
      model.set("gesture", gesture);
      model.set("values", values);
      model.save_changes();
    } else if (isLast) {
      show();
    }
    if (isLast) gesture += 1;
  };
  const button = (text, label, onclick) =>
    makeElement(
      "button",
      { type: "button", className: "nbllm-button", title: label, "aria-label": label, onclick },
      text,
    );

  const presets = makeElement("div", { className: "nbllm-row", role: "group" });
  presets.setAttribute("aria-label", "presets");
  const undo = button("↶", "Undo (Ctrl+Z)", () => model.send({ type: "undo" }));
  const redo = button("↷", "Redo (Ctrl+Shift+Z)", () => model.send({ type: "redo" }));
  const head = makeElement(
    "div",
    { className: "nbllm-row nbllm-controls-head" },
    presets,
    makeElement("div", { className: "nbllm-row" }, undo, redo),
  );

  const controls = [...CONTROLS, ...MORE_CONTROLS].map((one) => makeControl(one, send));
  const fields = controls.map((control) => control.field);
  const grid = (items) => makeElement("div", { className: "nbllm-controls-grid" }, ...items);
  const idleNote = makeElement("div", { className: "nbllm-muted", "aria-live": "polite" });
  const more = makeElement("details", {}, makeElement("summary", {}, "More parameters"));
  more.append(grid(fields.slice(CONTROLS.length)));

  const code = makeElement("code");
  const copied = makeElement("span", { className: "nbllm-muted", "aria-live": "polite" });
  const copy = button("Copy", "Copy the code", async () => {
    await copyText(model.get("code_text"), el);
    copied.textContent = "copied";
  });
  const source = makeElement(
    "details",
    {},
    makeElement("summary", {}, "As code"),
    makeElement("pre", { className: "nbllm-controls-code" }, code),
    makeElement("div", { className: "nbllm-row" }, copy, copied),
  );

  const prompt = makeElement("input", { type: "text", "aria-label": "prompt of the curve" });
  prompt.placeholder = "a prompt: shows the odds of the token after it";
  let asked = model.get("prompt") ?? "";
  const ask = () => {
    if (!prompt.value || prompt.value === asked) return;
    asked = prompt.value;
    model.send({ type: "preview", prompt: asked });
  };
  prompt.addEventListener("change", ask);
  prompt.addEventListener("keydown", (event) => event.key === "Enter" && ask());
  const picture = makeElement("div", { className: "nbllm-controls-picture" });
  const failure = makeElement("div", { className: "nbllm-controls-hint", role: "alert" });
  const curve = makeElement(
    "div",
    { className: "nbllm-controls-curve" },
    makeElement("div", { className: "nbllm-controls-prompt" }, "Next token after", prompt),
    picture,
    failure,
  );

  const showPresets = () => {
    const [values, all] = [model.get("values"), model.get("presets") ?? {}];
    const names = Object.keys(all);
    // Made anew only for other presets: a button that is replaced under the mouse is not clicked.
    if (names.join("\n") !== [...presets.children].map((one) => one.textContent).join("\n")) {
      presets.replaceChildren(
        ...names.map((name) => button(name, name, () => model.send({ type: "preset", name }))),
      );
    }
    names.forEach((name, index) => {
      const isOn = Object.keys(all[name]).every((key) => all[name][key] === values[key]);
      presets.children[index].setAttribute("aria-pressed", String(isOn));
    });
  };
  const show = () => {
    const [values, errors, idle] = ["values", "errors", "idle"].map((name) => model.get(name));
    for (const { name, show } of controls) show(values[name], errors[name], idle[name]);
    const reasons = [...new Set(Object.values(idle))];
    const namesOf = (reason) => Object.keys(idle).filter((name) => idle[name] === reason);
    idleNote.textContent = reasons.map((one) => `${namesOf(one).join(", ")}: ${one}.`).join(" ");
    undo.disabled = !model.get("can_undo");
    redo.disabled = !model.get("can_redo");
    code.textContent = model.get("code_text") || "What is marked above has to be right first.";
    copy.disabled = !model.get("code_text");
    copied.textContent = "";
  };
  const showCurve = () => {
    curve.hidden = !model.get("can_preview");
    const isTyping = el.getRootNode().activeElement === prompt;
    if (!isTyping) asked = prompt.value = model.get("prompt") ?? "";
    failure.textContent = model.get("curve_error");
    picture.innerHTML = model.get("curve"); // made and escaped in Python
  };
  const onKey = (event) => {
    const isText = event.target.matches?.("textarea, input:not([type=range], [type=checkbox])");
    if (isText || event.key.toLowerCase() !== "z" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    event.stopPropagation();
    model.send({ type: event.shiftKey ? "redo" : "undo" });
  };

  const panel = makeElement("div", { className: "nbllm-panel nbllm-controls", role: "group" });
  panel.setAttribute("aria-label", "sampling parameters");
  panel.append(head, grid(fields.slice(0, CONTROLS.length)), idleNote, more, source, curve);
  panel.addEventListener("keydown", onKey);
  el.append(panel);
  const listeners = {
    values: [show, showPresets],
    presets: [showPresets],
    errors: [show],
    idle: [show],
    code_text: [show],
    can_undo: [show],
    can_redo: [show],
    curve: [showCurve],
    curve_error: [showCurve],
    can_preview: [showCurve],
    prompt: [showCurve],
  };
  const each = (act) => {
    for (const [name, ones] of Object.entries(listeners)) {
      for (const one of ones) model[act](`change:${name}`, one);
    }
  };
  each("on");
  show();
  showPresets();
  showCurve();
  return () => {
    each("off");
    panel.remove();
  };
}
