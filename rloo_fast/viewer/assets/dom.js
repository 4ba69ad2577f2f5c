// Elements from values. Text becomes a text node, whatever it says: nothing here parses HTML.

export function h(tag, props, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name in PROPERTIES) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  append(element, children);
  return element;
}

const PROPERTIES = { value: 1, checked: 1, disabled: 1, selected: 1, open: 1 };

export function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

export const byId = (id) => document.getElementById(id);

export function choices(label, options, value, change) {
  const buttons = options.map(([key, text]) =>
    h("button", {
      type: "button", "aria-pressed": String(key === value), onclick: () => change(key),
    }, text));
  return h("div", { class: "segmented", role: "group", "aria-label": label }, buttons);
}

export function picker(label, options, value, change) {
  const entries = options.map(([key, text]) =>
    h("option", { value: key, selected: String(key) === String(value) }, text));
  return h("label", { class: "field" }, h("span", {}, label),
    h("select", { onchange: (event) => change(event.target.value) }, entries));
}

// What the colours of lines stand for.
export function keyOf(names, colourOf) {
  return h("p", { class: "key" }, names.map((name, i) => {
    const dot = h("i", { class: "dot" });
    dot.style.background = colourOf(i);
    return h("span", {}, dot, name);
  }));
}

// Items that are drawn when they come near the window, and dropped when they are far from it.
export function lazyList(items, estimate, render) {
  const boxes = items.map((item) => {
    const box = h("div", { class: "lazy" });
    box.style.minHeight = `${estimate(item)}px`;
    return box;
  });
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const box = entry.target;
      if (entry.isIntersecting && !box.firstChild) {
        box.append(render(items[boxes.indexOf(box)]));
        box.style.minHeight = "";
      } else if (!entry.isIntersecting && box.firstChild) {
        if (box.contains(document.activeElement)) continue;
        box.style.minHeight = `${box.offsetHeight}px`;
        box.replaceChildren();
      }
    }
  }, { rootMargin: "900px 0px" });
  boxes.forEach((box) => watcher.observe(box));
  const list = h("div", { class: "list" }, boxes);
  list.reveal = (number) => {
    const box = boxes[number];
    if (!box) return null;
    if (!box.firstChild) {
      box.append(render(items[number]));
      box.style.minHeight = "";
    }
    box.scrollIntoView({ block: "start" });
    return box;
  };
  list.stop = () => watcher.disconnect();
  return list;
}
