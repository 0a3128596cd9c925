// The remaining-length curve: predicted remaining tokens against tokens so far, as SVG.

const MARGIN = { left: 44, right: 14, top: 10, bottom: 34 };

const element = (name, attributes, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

// The smallest of 1, 2, 5 times a power of ten that cuts `range` into at most five steps.
const tickStep = (range) => {
  const power = 10 ** Math.floor(Math.log10(range / 5));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => range / step <= 5);
};

export class Chart {
  #svg;
  #frame = 0;
  #onPoint;
  points = []; // [tokens so far, remaining]
  interval = null;
  target = null;
  marked = null;

  constructor(svg, onPoint) {
    this.#svg = svg;
    this.#onPoint = onPoint;
    new ResizeObserver(() => this.redraw()).observe(svg);
    svg.addEventListener("pointermove", (event) => this.#point(event));
    svg.addEventListener("pointerleave", () => this.#onPoint(null));
  }

  clear(target) {
    Object.assign(this, { points: [], interval: null, target, marked: null });
    this.redraw();
  }

  add(tokens, remaining) {
    this.points.push([tokens, remaining]);
    this.redraw();
  }

  mark(index) {
    this.marked = index;
    this.redraw();
  }

  redraw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.#draw());
  }

  #scales() {
    const { width, height } = this.#svg.getBoundingClientRect();
    const ends = this.points.map(([tokens, remaining]) => tokens + remaining);
    const last = ends.length ? Math.max(ends.at(-1), this.points.at(-1)[0]) : 0;
    const maxX = Math.max(10, last, this.target ?? 0);
    const heights = this.points.map((point) => point[1]);
    const maxY = Math.max(10, this.target ?? 0, this.interval?.[1] ?? 0, heights.reduce((a, b) => Math.max(a, b), 0));
    const plotWidth = width - MARGIN.left - MARGIN.right;
    const plotHeight = height - MARGIN.top - MARGIN.bottom;
    return {
      maxX,
      maxY,
      plotWidth,
      x: (tokens) => MARGIN.left + (tokens / maxX) * plotWidth,
      y: (remaining) => MARGIN.top + (1 - remaining / maxY) * plotHeight,
    };
  }

  #draw() {
    const scales = this.#scales();
    if (scales.plotWidth <= 0) return;
    const { x, y } = scales;
    const shapes = this.#axes(scales);
    if (this.target) shapes.push(element("line", { class: "goal", x1: x(0), y1: y(this.target), x2: x(this.target), y2: y(0) }));
    if (this.interval) {
      const [low, high] = this.interval;
      shapes.push(element("line", { class: "band", x1: x(0), y1: y(low), x2: x(0), y2: y(high) }));
    }
    if (this.points.length) shapes.push(...this.#curve(x, y));
    this.#svg.replaceChildren(...shapes);
  }

  #axes({ maxX, maxY, x, y }) {
    const shapes = [];
    const stepX = tickStep(maxX);
    const stepY = tickStep(maxY);
    for (let at = 0; at <= maxY; at += stepY) {
      shapes.push(element("line", { class: "grid", x1: x(0), x2: x(maxX), y1: y(at), y2: y(at) }));
      shapes.push(element("text", { x: x(0) - 8, y: y(at) + 4, "text-anchor": "end" }, at));
    }
    for (let at = 0; at <= maxX; at += stepX) {
      shapes.push(element("text", { x: x(at), y: y(0) + 16, "text-anchor": "middle" }, at));
    }
    shapes.push(element("text", { x: x(maxX / 2), y: y(0) + 31, "text-anchor": "middle" }, "tokens so far"));
    return shapes;
  }

  #curve(x, y) {
    const line = this.points.map(([tokens, remaining]) => `${x(tokens).toFixed(1)},${y(remaining).toFixed(1)}`).join("L");
    const [firstX, lastX] = [x(this.points[0][0]), x(this.points.at(-1)[0])];
    const [tokens, remaining] = this.points[this.marked ?? this.points.length - 1];
    return [
      element("path", { class: "area", d: `M${firstX},${y(0)}L${line}L${lastX},${y(0)}Z` }),
      element("path", { class: "curve", d: `M${line}` }),
      element("circle", { class: "dot", cx: x(tokens), cy: y(remaining), r: 5 }),
    ];
  }

  #point(event) {
    if (!this.points.length) return;
    const { maxX, plotWidth } = this.#scales();
    const at = ((event.clientX - this.#svg.getBoundingClientRect().left - MARGIN.left) / plotWidth) * maxX;
    const index = this.points.findIndex(([tokens]) => tokens >= at);
    this.#onPoint(index < 0 ? this.points.length - 1 : index);
  }
}
