// The answer as pieces of text, each shaded by the value of the states its tokens were sampled from.

const mean = (numbers) => numbers.reduce((sum, number) => sum + number, 0) / numbers.length;
const shorten = (numbers, digits) =>
  (numbers.length > 4 ? [...numbers.slice(0, 2), "…", numbers.at(-1)] : numbers)
    .map((number) => (typeof number === "number" ? number.toFixed(digits) : number))
    .join(", ");

export class Answer {
  #root;
  #tip;
  #onActive;
  #pieces = []; // {node, description, last: index of its last token, or -1}
  #pending = { values: [], remaining: [] }; // of tokens whose text has not come yet
  #active = -1;
  #numTokens = 0;

  constructor(root, tip, onActive) {
    this.#root = root;
    this.#tip = tip;
    this.#onActive = onActive;
    root.addEventListener("pointerover", (event) => this.#activate(this.#pieces.findIndex((piece) => piece.node === event.target)));
    root.addEventListener("pointerleave", () => this.#activate(-1));
    root.addEventListener("blur", () => this.#activate(-1));
    root.addEventListener("scroll", () => this.#placeTip());
    root.addEventListener("keydown", (event) => this.#onKey(event));
  }

  clear() {
    this.#activate(-1);
    this.#root.replaceChildren();
    this.#pieces = [];
    this.#pending = { values: [], remaining: [] };
    this.#numTokens = 0;
  }

  add(text, values = [], remaining = []) {
    this.#pending.values.push(...values);
    this.#pending.remaining.push(...remaining);
    if (text) this.#addPiece(text, "token");
  }

  // Tokens without text at the end (the end-of-sequence token) get a visible mark.
  finish() {
    if (this.#pending.values.length) this.#addPiece("end", "token end");
  }

  // Show the piece that token `index` belongs to; null for none.
  showToken(index) {
    this.#activate(index === null ? -1 : this.#pieces.findIndex((piece) => piece.last >= index), false);
  }

  #addPiece(text, kind) {
    const { values, remaining } = this.#pending;
    this.#pending = { values: [], remaining: [] };
    this.#numTokens += values.length;
    const node = document.createElement("span");
    node.className = kind;
    node.textContent = text;
    let description = "no value";
    if (values.length) {
      node.style.setProperty("--far", Math.sqrt(-mean(values)).toFixed(3)); // the root tells small values apart
      const first = this.#numTokens - values.length + 1;
      const place = values.length > 1 ? `tokens ${first} to ${this.#numTokens}` : `token ${first}`;
      description = `${place}\nvalue ${shorten(values, 3)}\nremaining ${shorten(remaining, 0)} tokens`;
    }
    const isAtBottom = this.#root.scrollHeight - this.#root.scrollTop - this.#root.clientHeight < 40;
    this.#root.append(node);
    this.#pieces.push({ node, description, last: values.length ? this.#numTokens - 1 : -1 });
    if (isAtBottom) this.#root.scrollTop = this.#root.scrollHeight;
  }

  #onKey(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || !this.#pieces.length) return;
    event.preventDefault();
    this.#activate(Math.min(Math.max(this.#active + steps[event.key], 0), this.#pieces.length - 1));
    this.#pieces[this.#active].node.scrollIntoView({ block: "nearest" });
    this.#placeTip();
  }

  #activate(index, tells = true) {
    this.#pieces[this.#active]?.node.classList.remove("active");
    this.#active = index;
    const piece = this.#pieces[index];
    piece?.node.classList.add("active");
    this.#tip.hidden = !piece;
    this.#tip.textContent = piece?.description ?? "";
    this.#placeTip();
    if (piece) this.#root.setAttribute("aria-description", `${piece.node.textContent}: ${piece.description}`);
    if (tells) this.#onActive(piece && piece.last >= 0 ? piece.last : null);
  }

  #placeTip() {
    const piece = this.#pieces[this.#active];
    if (!piece) return;
    const box = piece.node.getClientRects()[0];
    const tip = this.#tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.width / 2), innerWidth - tip.width - 8);
    const above = box.top - tip.height - 8;
    this.#tip.style.left = `${left}px`;
    this.#tip.style.top = `${above < 8 ? box.bottom + 8 : above}px`;
  }
}
