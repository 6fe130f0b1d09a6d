"use strict";
// Everything from the data goes through textContent: no string here is ever read as markup.
(() => {
  const PAGE_SIZE = 50;
  const SUMMARY_LENGTH = 300;
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === "text") element.textContent = value;
      else if (name === "class") element.className = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  // --- theme ---

  const THEMES = ["auto", "light", "dark"];
  const themeButton = byId("theme");

  function remember(theme) {
    try {
      localStorage.setItem("in2core-theme", theme);
    } catch {
      // A file opened without storage forgets the choice; nothing else depends on it.
    }
  }

  function recall() {
    try {
      return localStorage.getItem("in2core-theme");
    } catch {
      return null;
    }
  }

  function setTheme(theme) {
    if (theme === "auto") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.dataset.theme = theme;
    themeButton.textContent = `Theme: ${theme}`;
  }

  let theme = THEMES.includes(recall()) ? recall() : "auto";
  setTheme(theme);
  themeButton.hidden = false;
  themeButton.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    setTheme(theme);
    remember(theme);
  });

  if (!data.rows) return;

  // --- showing values ---

  const counts = new Intl.NumberFormat("en");
  const figures = new Intl.NumberFormat("en", { maximumSignificantDigits: 4, signDisplay: "exceptZero" });

  function showInfluence(value) {
    if (value === null) return "none";
    const size = Math.abs(value);
    return size !== 0 && (size >= 1e7 || size < 1e-3) ? `${value > 0 ? "+" : ""}${value.toExponential(2)}` : figures.format(value);
  }

  const showCount = (value) => (value === null ? "–" : counts.format(value));
  const showCoreset = (value) => (value === null ? "no" : data.fractions.length > 1 ? `≤ ${value}` : "yes");

  // Characters that show nothing or turn the direction of writing are named, as a reader of data wants to see them.
  const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g;

  function visible(text) {
    return text.replace(INVISIBLE, (c) => {
      const code = c.charCodeAt(0);
      if (code === 13) return "";
      if (code < 32) return String.fromCharCode(0x2400 + code);
      return `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
    });
  }

  const cellText = (value) => (value === null || value === undefined ? "" : String(value));
  const groupName = (group, index) => group.names[group.codes[index]];
  const indexOf = new Map(data.rows.map((row, index) => [row, index]));
  const cutRows = new Set(data.cut);

  function summarize(index) {
    let text = "";
    for (const name of data.textColumns) {
      text += (text ? " ⏎ " : "") + cellText(data.columns[name][index]).slice(0, SUMMARY_LENGTH).trim();
      if (text.length > SUMMARY_LENGTH) break;
    }
    return visible(text.slice(0, SUMMARY_LENGTH).replace(/\s+/g, " "));
  }

  function signClass(value) {
    return value === null ? "none" : value < 0 ? "proponent" : value > 0 ? "opponent" : "none";
  }

  // What a coreset keeps is no opponent, whatever its sign.
  const isKept = (index) => data.coreset[index] !== null && data.coreset[index] < 1;

  function kindOf(index) {
    const sign = signClass(data.influence[index]);
    return sign === "opponent" && isKept(index) ? "positive" : sign;
  }

  // --- table: columns, filter, sort, pages ---

  // Of turns every row has its own, who takes it there, and what for; else only rows that were taken have one.
  const { inTurn, isTurns, byInfluence } = data.choice;
  const columns = [
    { name: "rank", title: inTurn ? (isTurns ? "Turn" : "Best rank") : "Rank", hint: byInfluence ? "0 = strongest proponent" : data.choice.meaning, key: (i) => data.rank[i], cell: (i) => showCount(data.rank[i]), number: true },
    { name: "influence", title: byInfluence ? "Influence" : "Mean influence", hint: byInfluence ? "negative = proponent" : "on the mean validation loss, which chose nothing", key: (i) => data.influence[i], cell: (i) => showInfluence(data.influence[i]), number: true },
    { name: "tokens", title: "Loss tokens", key: (i) => data.tokens[i], cell: (i) => showCount(data.tokens[i]), number: true },
  ];
  const showTaker = (taker) => (taker ? `${visible(taker.by).replace(/^validation /, "")}: ${showInfluence(taker.for)}` : "–");
  if (inTurn && isTurns) {
    const taker = (i) => data.takers[i];
    columns.splice(1, 0, { name: "taker", title: `Taken by: ${data.choice.takenFor}`, hint: "also of rows that no coreset has, whose turn comes later", data: true, key: (i) => taker(i)?.by ?? null, cell: (i) => showTaker(taker(i)) });
  } else if (inTurn) {
    const turn = (i) => data.taken[i]?.turn ?? null;
    columns.splice(1, 0,
      { name: "turn", title: "Turn", hint: "0 = taken first; none = not in a coreset", key: turn, cell: (i) => showCount(turn(i)), number: true },
      { name: "taker", title: "Taken by", hint: "and influence on it", data: true, key: (i) => data.taken[i]?.by ?? null, cell: (i) => showTaker(data.taken[i]) },
    );
  }
  // Of one coreset the turn tells which rows it has.
  if (data.fractions.length > (inTurn && !isTurns && data.taken.some(Boolean) ? 1 : 0)) {
    columns.push({ name: "coreset", title: "Coreset", hint: data.fractions.length > 1 ? "smallest fraction that has the row" : `fraction ${data.fractions[0]}`, key: (i) => data.coreset[i], cell: (i) => showCoreset(data.coreset[i]) });
  }
  data.groups.forEach((group, g) => {
    columns.push({ name: `group${g}`, title: group.column, data: true, key: (i) => groupName(group, i), cell: (i) => visible(groupName(group, i)) });
  });
  for (const [name, values] of Object.entries(data.sets)) {
    columns.push({ name: `set-${name}`, title: name.replace(/^influence_/, "on "), data: true, key: (i) => values[i], cell: (i) => showInfluence(values[i]), number: true });
  }
  columns.push({ name: "text", title: "Text", key: (i) => summarize(i).toLowerCase(), cell: summarize });

  const table = byId("rows");
  table.classList.toggle("in-turn", inTurn);
  const [head, body] = [table.tHead, table.tBodies[0]];
  const state = { search: "", sign: "", coreset: "", groups: data.groups.map(() => ""), sort: "rank", ascending: true, page: 0, focus: 0 };
  let found = [];
  let haystack = null;

  function matchesSearch(index, words) {
    // Made at the first search: most readers only sort.
    haystack ??= data.rows.map((row, i) =>
      Object.values(data.columns).map((column) => cellText(column[i])).join("\n").toLowerCase(),
    );
    return words.every((word) => haystack[index].includes(word));
  }

  function matchesCoreset(index) {
    if (state.coreset === "") return true;
    const value = data.coreset[index];
    return state.coreset === "no" ? value === null : value !== null && value <= Number(state.coreset);
  }

  function refresh() {
    const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
    found = [];
    for (let i = 0; i < data.rows.length; i++) {
      if (state.sign && { "-": "proponent", "+": "opponent", 0: "none", kept: "positive" }[state.sign] !== kindOf(i)) continue;
      if (!matchesCoreset(i)) continue;
      if (data.groups.some((group, g) => state.groups[g] !== "" && group.codes[i] !== Number(state.groups[g]))) continue;
      if (words.length && !matchesSearch(i, words)) continue;
      found.push(i);
    }
    const column = columns.find((c) => c.name === state.sort);
    const keys = new Map(found.map((i) => [i, column.key(i)]));
    const sign = state.ascending ? 1 : -1;
    found.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      if (x === y) return data.rows[a] - data.rows[b];
      if (x === null) return 1; // what has no value comes last, whatever the direction
      if (y === null) return -1;
      return (x < y ? -1 : 1) * sign;
    });
    state.page = 0;
    state.focus = 0;
    draw();
  }

  function countPages() {
    return Math.max(1, Math.ceil(found.length / PAGE_SIZE));
  }

  function draw() {
    const start = state.page * PAGE_SIZE;
    const shown = found.slice(start, start + PAGE_SIZE);
    body.replaceChildren(...shown.map((index, n) => drawRow(index, n)));
    for (const th of head.querySelectorAll("th")) {
      const sorted = th.dataset.name === state.sort;
      if (sorted) th.setAttribute("aria-sort", state.ascending ? "ascending" : "descending");
      else th.removeAttribute("aria-sort");
    }
    byId("sorter").value = `${state.sort} ${state.ascending ? "up" : "down"}`;
    const total = counts.format(data.rows.length);
    const range = shown.length ? `, ${counts.format(start + 1)} to ${counts.format(start + shown.length)} shown` : "";
    byId("count").textContent = found.length === data.rows.length ? `${total} rows${range}` : `${counts.format(found.length)} of ${total} rows${range}`;
    byId("page").textContent = `Page ${state.page + 1} of ${countPages()}`;
    for (const id of ["first", "previous"]) byId(id).disabled = state.page === 0;
    for (const id of ["next", "last"]) byId(id).disabled = state.page >= countPages() - 1;
  }

  function drawRow(index, n) {
    const cells = columns.map((column) => {
      const cell = make("td", { role: "cell", class: `${column.name.replace(/\d+$/, "")}${column.number ? " number" : ""}`, text: column.cell(index) });
      cell.dataset.title = column.title;
      if (column.name === "influence") cell.classList.add(kindOf(index));
      if (column.name === "coreset" && data.coreset[index] !== null) cell.classList.add("kept");
      if (column.data || column.name === "text") cell.dir = "auto";
      return cell;
    });
    const told = [`Row ${data.rows[index]}`, ...(isTurns && data.taken[index] ? [data.taken[index].words] : []), data.standing[index]];
    const row = make("tr", { role: "row", tabindex: n === state.focus ? "0" : "-1", "aria-label": `${told.join(", ")}. Enter opens it.` }, ...cells);
    row.dataset.row = data.rows[index];
    return row;
  }

  function focusRow(n) {
    const rows = [...body.rows];
    if (!rows.length) return;
    state.focus = Math.max(0, Math.min(n, rows.length - 1));
    rows.forEach((row, i) => (row.tabIndex = i === state.focus ? 0 : -1));
    rows[state.focus].focus();
  }

  function turnPage(page) {
    state.page = Math.max(0, Math.min(page, countPages() - 1));
    state.focus = 0;
    draw();
    if (table.getBoundingClientRect().top < 0) table.scrollIntoView();
  }

  function sortBy(name, ascending) {
    state.sort = name;
    state.ascending = ascending;
    refresh();
  }

  function drawHead() {
    const sorter = byId("sorter");
    const cells = columns.map((column) => {
      const button = make("button", { type: "button", text: column.title, onclick: () => sortBy(column.name, state.sort === column.name ? !state.ascending : true) });
      if (column.hint) button.title = column.hint;
      if (column.data) button.dir = "auto";
      const th = make("th", { scope: "col", role: "columnheader", class: column.number ? "number" : "" }, button);
      th.dataset.name = column.name;
      for (const [direction, arrow] of [["up", "↑"], ["down", "↓"]]) {
        sorter.append(make("option", { value: `${column.name} ${direction}`, text: `${column.title} ${arrow}` }));
      }
      return th;
    });
    head.replaceChildren(make("tr", { role: "row" }, ...cells));
    sorter.addEventListener("change", () => {
      const [name, direction] = sorter.value.split(" ");
      sortBy(name, direction === "up");
    });
  }

  function drawFilters() {
    const coreset = byId("coreset");
    coreset.append(make("option", { value: "", text: "all" }));
    if (!data.rows.some((row, i) => kindOf(i) === "positive")) byId("sign").querySelector("[value=kept]").remove();
    for (const fraction of data.fractions) coreset.append(make("option", { value: fraction, text: `in fraction ${fraction}` }));
    coreset.append(make("option", { value: "no", text: "in none" }));
    byId("coreset-label").hidden = data.fractions.length === 0;
    coreset.addEventListener("change", () => {
      state.coreset = coreset.value;
      refresh();
    });
    data.groups.forEach((group, g) => {
      const select = make("select", {}, make("option", { value: "", text: "all" }));
      group.names.slice(0, 200).forEach((name, code) => select.append(make("option", { value: code, text: visible(name).slice(0, 60) })));
      select.addEventListener("change", () => {
        state.groups[g] = select.value;
        refresh();
      });
      byId("group-filters").append(make("label", { dir: "auto" }, `${visible(group.column)} `, select));
    });
    byId("sign").addEventListener("change", (event) => {
      state.sign = event.target.value;
      refresh();
    });
    let timer = 0;
    byId("search").addEventListener("input", (event) => {
      clearTimeout(timer);
      timer = setTimeout(() => {
        state.search = event.target.value;
        refresh();
      }, 120);
    });
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("show-all").addEventListener("click", () => {
      clearTimeout(timer);
      byId("filters").reset();
      Object.assign(state, { search: "", sign: "", coreset: "", groups: data.groups.map(() => ""), sort: "rank", ascending: true });
      refresh();
    });
  }

  byId("first").addEventListener("click", () => turnPage(0));
  byId("previous").addEventListener("click", () => turnPage(state.page - 1));
  byId("next").addEventListener("click", () => turnPage(state.page + 1));
  byId("last").addEventListener("click", () => turnPage(countPages() - 1));

  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    // Marking text with the mouse is not opening.
    if (row && document.getSelection().isCollapsed) openRow(Number(row.dataset.row));
  });
  body.addEventListener("focusin", (event) => {
    const n = [...body.rows].indexOf(event.target);
    if (n >= 0 && n !== state.focus) {
      [...body.rows].forEach((row, i) => (row.tabIndex = i === n ? 0 : -1));
      state.focus = n;
    }
  });
  body.addEventListener("keydown", (event) => {
    const row = event.target.closest("tr");
    if (!row || event.altKey || event.ctrlKey || event.metaKey) return;
    const n = [...body.rows].indexOf(row);
    if (event.key === "Enter" || event.key === " ") openRow(Number(row.dataset.row));
    else if (event.key === "ArrowDown") {
      if (n === body.rows.length - 1 && state.page < countPages() - 1) turnPage(state.page + 1), focusRow(0);
      else focusRow(n + 1);
    } else if (event.key === "ArrowUp") {
      if (n === 0 && state.page > 0) turnPage(state.page - 1), focusRow(PAGE_SIZE - 1);
      else focusRow(n - 1);
    } else if (event.key === "Home") focusRow(0);
    else if (event.key === "End") focusRow(PAGE_SIZE);
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || reader.open || event.target.closest("input, select, textarea")) return;
    event.preventDefault();
    byId("search").focus();
  });

  // --- reading a row ---

  const reader = byId("reader");
  const content = byId("reader-content");
  let opened = null;
  let cameFrom = null; // the validation row through which a row was opened
  let opener = null; // the link outside the table that opened a row, which has the focus afterwards

  function openReader(title, parts) {
    const close = make("button", { type: "button", class: "close", "aria-label": "Close", text: "✕", onclick: () => reader.close() });
    content.replaceChildren(make("div", { class: "bar" }, make("h2", { id: "reader-title", text: title }), close), ...parts);
    if (!reader.open) reader.showModal();
    reader.scrollTop = 0;
  }

  function setAddress(hash) {
    try {
      history.replaceState(null, "", hash || location.pathname + location.search);
    } catch {
      // An embedded page has no address of its own.
    }
  }

  function openRow(row, through = null) {
    const index = indexOf.get(row);
    if (index === undefined) return;
    opened = row;
    cameFrom = through;
    const value = data.influence[index];
    const loss = byInfluence ? "the validation loss" : "the mean validation loss";
    const says = (change) => (data.unsure[index] ? `: what one more step on it does to ${loss} lies within the error` : `: training on it ${change} ${loss}`);
    const kind = { proponent: `proponent${says("lowers")}`, opponent: `opponent${says("raises")}`, positive: `positive, but a coreset keeps it${says("raises")}`, none: value === null ? "none: it carries no loss" : "neither proponent nor opponent" }[kindOf(index)];
    const list = make("dl", { class: "row-facts" });
    const add = (label, text) => list.append(make("div", {}, make("dt", { text: label, dir: "auto" }), make("dd", { text, dir: "auto" })));
    const taken = data.taken[index];
    if (data.fractions.length) add("in coreset", data.coreset[index] === null ? "no" : `yes, from fraction ${data.coreset[index]}${taken ? `: ${visible(taken.words)}` : ""}`);
    const percentile = data.percentile[index] === null ? "" : `percentile ${data.percentile[index].toFixed(1)}`;
    if (inTurn) add("in line", visible(data.standing[index]));
    else add("rank", data.rank[index] === null ? "none" : `${showCount(data.rank[index])} (${byInfluence ? `0 = strongest proponent; ${percentile}` : isTurns ? percentile : visible(data.standing[index])})`);
    add(byInfluence ? "influence" : "mean influence", value === null ? kind : `${showInfluence(value)} (${kind})`);
    if (data.steps[index]) add("validation loss", data.steps[index]);
    add("loss tokens", showCount(data.tokens[index]));
    for (const [name, values] of Object.entries(data.sets)) add(name, showInfluence(values[index]));
    const long = [];
    for (const [name, column] of Object.entries(data.columns)) {
      if (data.textColumns.includes(name)) continue;
      const text = visible(cellText(column[index]));
      if (text.length > 80 || text.includes("\n")) long.push([name, text]);
      else add(visible(name), text || "–");
    }
    const parts = [drawSteps(row), list];
    if (cutRows.has(index)) parts.push(make("p", { class: "warn", text: `Long text is cut to ${counts.format(data.limit)} characters in this page; the dataset has all of it.` }));
    const mask = data.masks[row];
    const texts = data.textColumns.map((name) => [name, visible(cellText(data.columns[name][index]))]);
    if (mask) {
      parts.push(drawMask(mask, index));
      const raw = make("details", {}, make("summary", { text: "Columns as they are in the data" }));
      for (const [name, text] of texts) raw.append(make("h3", { text: visible(name), dir: "auto" }), make("pre", { text, dir: "auto" }));
      parts.push(raw);
    } else {
      for (const [name, text] of texts) parts.push(make("h3", { text: visible(name), dir: "auto" }), make("pre", { text, dir: "auto" }));
      parts.push(make("p", { class: "hint", text: `No mask for this row. ${data.maskNote}` }));
    }
    for (const [name, text] of long) parts.push(make("h3", { text: visible(name), dir: "auto" }), make("pre", { text, dir: "auto" }));
    openReader(`Row ${counts.format(row)}`, parts);
    setAddress(`#row-${row}`);
  }

  function drawSteps(row) {
    const steps = make("div", { class: "steps" });
    if (cameFrom !== null) {
      const query = data.queries[cameFrom];
      steps.append(make("button", { type: "button", text: `‹ Back to ${query.set} row ${query.row}`, onclick: () => openQuery(cameFrom) }));
      return steps;
    }
    const place = found.indexOf(indexOf.get(row));
    const previous = make("button", { type: "button", text: "‹ Previous", onclick: () => step(-1) });
    const next = make("button", { type: "button", text: "Next ›", onclick: () => step(1) });
    previous.disabled = place <= 0;
    next.disabled = place < 0 || place >= found.length - 1;
    const where = place < 0 ? "not among the rows found" : `${counts.format(place + 1)} of ${counts.format(found.length)} in this order`;
    steps.append(previous, make("span", { class: "hint", text: where }), next);
    return steps;
  }

  function step(by) {
    const place = found.indexOf(indexOf.get(opened));
    const index = place < 0 ? undefined : found[place + by];
    if (index === undefined) return;
    state.page = Math.floor((place + by) / PAGE_SIZE);
    state.focus = (place + by) % PAGE_SIZE;
    draw();
    openRow(data.rows[index]);
    const button = content.querySelector(by < 0 ? ".steps button:first-child" : ".steps button:last-child");
    (button.disabled ? content.querySelector(".close") : button).focus();
  }

  function drawMask([numTokens, ...parts], index) {
    const text = make("pre", { class: "mask", dir: "auto" });
    for (const [part, carriesLoss] of parts) {
      if (carriesLoss) text.append(make("mark", { text: visible(part) }));
      else text.append(make("span", { text: visible(part) }));
    }
    const legend = make("p", { class: "hint" }, make("mark", { text: "Underlined" }), ` text carried loss: ${showCount(data.tokens[index])} of ${counts.format(numTokens)} tokens. The text is as the model read it, special tokens included.`);
    return make("section", { "aria-label": "Text with its mask" }, make("h3", { text: "What the model read" }), legend, text);
  }

  function openQuery(q) {
    const query = data.queries[q];
    opened = null;
    const parts = [];
    if (query.text !== null) parts.push(make("pre", { text: visible(query.text), dir: "auto" }));
    const lists = [["Helped most by", query.proponents, "No training row lowers its loss."], ["Hurt most by", query.opponents, "No training row raises its loss."]];
    for (const [title, pairs, none] of lists) {
      const list = make("ol", { class: "helpers" });
      for (const [row, value] of pairs) {
        const index = indexOf.get(row);
        const button = make("button", { type: "button", onclick: () => openRow(row, q) }, make("b", { class: signClass(value), text: showInfluence(value) }), make("span", { dir: "auto", text: `row ${counts.format(row)}: ${summarize(index)}` }));
        list.append(make("li", {}, button));
      }
      parts.push(make("h3", { text: title }), pairs.length ? list : make("p", { text: none }));
    }
    parts.push(make("p", { class: "hint", text: "Influence on this validation row alone; negative = proponent (training on the row lowers its loss)." }));
    openReader(`Validation row ${counts.format(query.row)} (${visible(query.set)})`, parts);
    setAddress("");
  }

  reader.addEventListener("click", (event) => {
    if (event.target === reader) reader.close();
  });
  reader.addEventListener("keydown", (event) => {
    if (opened === null || cameFrom !== null || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      event.preventDefault();
      step(event.key === "ArrowLeft" ? -1 : 1);
    }
  });
  reader.addEventListener("close", () => {
    setAddress("");
    const row = opened === null ? null : body.querySelector(`tr[data-row="${opened}"]`);
    if (opener) opener.focus();
    else if (row && cameFrom === null) focusRow([...body.rows].indexOf(row));
    opened = cameFrom = opener = null;
  });

  // --- start ---

  const queryList = byId("query-list");
  data.queries.forEach((query, q) => {
    const text = query.text === null ? "" : visible(query.text).replace(/\s+/g, " ").slice(0, SUMMARY_LENGTH);
    queryList.append(make("li", {}, make("button", { type: "button", onclick: () => openQuery(q) }, make("b", { text: `${visible(query.set)} ${counts.format(query.row)}` }), make("span", { dir: "auto", text }))));
  });
  drawHead();
  drawFilters();
  byId("filters").hidden = table.hidden = byId("pages").hidden = false;
  refresh();
  function openLinked() {
    const linked = /^#row-(\d+)$/.exec(location.hash);
    if (linked) openRow(Number(linked[1]));
  }

  openLinked();
  addEventListener("hashchange", () => {
    const link = document.activeElement;
    opener = link && link.classList.contains("row-link") ? link : null;
    openLinked();
  });
})();
