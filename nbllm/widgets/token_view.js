/**
 * Text, log-probability (null if a person wrote it), id, whether it is special, and what else could
 * have come, the best first: text, log-probability, id.
 * @typedef {[string, number | null, number, boolean, [string, number, number][]]} Token
 */

const HIDE_MS = 150; // the way from a token to its alternatives

/** An element; `classes` get the prefix nbllm-, `traits` are properties or attributes. */
function make(tag, classes = "", traits = {}, ...children) {
  const made = document.createElement(tag);
  made.className = classes.replace(/\S+/g, "nbllm-$&");
  for (const [name, value] of Object.entries(traits))
    name in made ? (made[name] = value) : made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return `${p >= 99.95 || p < 0.05 ? Math.round(p) : p.toFixed(1)} %`;
}

/** A text with something to see for what has no form of its own. */
function visible(text) {
  const marked = text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
  return marked === "" ? "⋯" : /^  +$/.test(marked) ? marked.replace(/ /g, "␣") : marked;
}

/**
 * A text, each token on the colour of its probability, with its alternatives on hover and focus.
 * @param {[number, string, string][]} colors least probability, background, text; descending
 * @param {(index: number, tokenId: number) => void} onBranch a token or an alternative is chosen
 */
function tokenView(colors, onBranch) {
  const list = make("div", "tokens", { role: "group", "aria-label": "tokens" });
  // A popover is above everything: the output of the cell does not cut it off.
  const popup = make("div", "alternatives", { role: "group", popover: "manual", hidden: true });
  const spoken = make("div", "visually-hidden", { "aria-live": "polite" });
  const el = make("div", "token-view", {}, list, popup, spoken);
  const tokens = /** @type {Token[]} */ ([]);
  const spans = /** @type {HTMLElement[]} */ ([]);
  let current = 0; // the one that Tab reaches
  let shown = -1; // whose alternatives are shown
  let parting = Infinity; // the first token that another text has not
  let timer = 0;
  const indexOf = (target) => spans.indexOf(target.closest(".nbllm-token"));

  function append(/** @type {Token[]} */ added) {
    const line = make("p"); // one text that grows would be laid out as a whole, again and again
    for (const token of added) {
      const [text, logprob, , special] = token;
      const at = tokens.push(token) - 1;
      const classes = `token ${special ? "special " : ""}${logprob === null ? "written" : ""}`;
      const span = make("span", classes, { role: "button" }, visible(text));
      mark(span, at);
      span.tabIndex = at === current ? 0 : -1;
      if (logprob !== null) {
        const [, background, color] = colors.find(([least]) => Math.exp(logprob) >= least);
        Object.assign(span.style, { background, color });
        span.dataset.p = percent(logprob);
        span.ariaLabel = `${visible(text)}, ${span.dataset.p}`;
      }
      list.append(span, /\n$/.test(text) ? "\n" : "");
      spans.push(span);
      if (!special) line.append(text);
    }
    spoken.append(line);
  }

  function cut(length) {
    if (length >= tokens.length) return;
    if (shown >= length) hide();
    while (spans[length].parentNode) list.lastChild.remove();
    tokens.length = spans.length = length;
    spoken.textContent = "";
    current = Math.max(Math.min(current, length - 1), 0);
    if (length) spans[current].tabIndex = 0;
  }

  function part(index) {
    if (index === parting) return;
    parting = index;
    spans.forEach(mark);
  }

  function mark({ classList }, at) {
    classList.toggle("nbllm-parted", at >= parting);
    classList.toggle("nbllm-parting", at === parting);
  }

  function show(index) {
    clearTimeout(timer);
    if (index < 0 || index === shown) return;
    hide();
    shown = index;
    const [text, logprob, id, , others] = tokens[index];
    const isKnown = others.some((other) => other[2] === id);
    popup.replaceChildren();
    for (const [other, p, otherId] of isKnown ? others : [[text, logprob, id]]) {
      const traits = { ariaCurrent: otherId === id, onclick: () => choose(index, otherId) };
      const piece = make("span", "piece", {}, other === " " ? "␣" : visible(other));
      const button = make("button", "alternative", traits, piece);
      if (p !== null) {
        const bar = make("span", "bar");
        bar.style.setProperty("--nbllm-p", Math.exp(p));
        button.append(bar, make("span", "p", {}, percent(p)));
      }
      popup.append(button);
    }
    popup.ariaLabel = `instead of ${visible(text)}`;
    popup.hidden = false;
    popup.showPopover?.();
    spans[index].classList.add("nbllm-shown");
    const box = spans[index].getClientRects()[0];
    const { clientWidth, clientHeight } = document.documentElement;
    const isBelow = box.bottom + popup.offsetHeight < clientHeight;
    const left = Math.min(box.left, clientWidth - popup.offsetWidth - 4);
    popup.style.left = `${Math.max(left, 0)}px`;
    popup.style.top = `${isBelow ? box.bottom : Math.max(box.top - popup.offsetHeight, 0)}px`;
  }

  function hide() {
    clearTimeout(timer);
    if (shown < 0) return;
    spans[shown].classList.remove("nbllm-shown");
    shown = -1;
    popup.hidePopover?.();
    popup.hidden = true;
  }

  function focus(index) {
    spans[current].tabIndex = -1;
    current = Math.max(Math.min(index, spans.length - 1), 0);
    spans[current].tabIndex = 0;
    spans[current].focus();
  }

  function choose(index, id) {
    hide();
    onBranch(index, id);
  }

  function onTokenKey(event) {
    const at = indexOf(event.target);
    const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length };
    if (event.key in moves) focus(moves[event.key]);
    else if (/^(Enter| |ArrowDown)$/.test(event.key) && !event.ctrlKey && !event.metaKey) {
      show(at);
      popup.firstChild.focus();
    } else {
      if (event.key === "Escape") hide();
      return;
    }
    event.preventDefault();
  }

  function onPopupKey(event) {
    const { nextSibling, previousSibling } = event.target;
    const moves = { ArrowDown: nextSibling, ArrowUp: previousSibling, Escape: spans[shown] };
    if (!(event.key in moves)) return;
    moves[event.key]?.focus();
    if (event.key === "Escape") hide();
    event.preventDefault();
    event.stopPropagation(); // Escape would stop the text, too
  }

  list.onpointerover = (event) => show(indexOf(event.target));
  list.addEventListener("focusin", list.onpointerover);
  list.onkeydown = onTokenKey;
  list.onclick = (event) => {
    const index = indexOf(event.target);
    if (index >= 0) choose(index, tokens[index][2]);
  };
  popup.onpointerover = () => clearTimeout(timer);
  popup.onkeydown = onPopupKey;
  el.onpointerleave = () => {
    if (!popup.matches(":focus-within")) timer = setTimeout(hide, HIDE_MS);
  };
  el.addEventListener("focusout", (event) => {
    if (!el.contains(event.relatedTarget)) hide();
  });
  return { el, list, tokens, append, cut, part };
}
