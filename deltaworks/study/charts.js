"use strict";
// What the pages of studies and of searches draw with.
const charts = (() => {
  const phone = () => window.innerWidth < 620;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const faint = (hex, part) => hex + Math.round(part * 255).toString(16).padStart(2, "0");

  function short(value, unit) {
    if (value === null || value === undefined) return "-";
    if (unit === "bytes") {
      for (const name of ["B", "KiB", "MiB"]) { if (value < 1024) return `${+value.toPrecision(3)} ${name}`; value /= 1024; }
      return `${+value.toPrecision(3)} GiB`;
    }
    if (unit === "s") return value < 1 ? `${+(value * 1000).toPrecision(3)} ms` : `${+value.toPrecision(3)} s`;
    for (const [bound, name] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= bound) return `${+(value / bound).toPrecision(3)} ${name}`;
    return `${+value.toPrecision(3)}`;
  }

  // Marks on a logarithmic axis that people can read: 1, 2 and 5 times powers of ten, or powers of two for bytes.
  function marks(values, unit) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const found = [];
    if (high / low < 2.5) {
      const base = unit === "bytes" ? 1024 ** Math.floor(Math.log(high) / Math.log(1024)) : 1;
      const width = Math.max(high - low, 0.02 * high) / base, power = 10 ** Math.floor(Math.log10(width));
      const step = [1, 2, 5, 10].map((part) => part * power).find((part) => width / part <= (phone() ? 3 : 5));
      for (let value = Math.floor(low / base / step) * step; value * base <= high * 1.01; value += step)
        found.push(value * base);
      return found.filter((value) => value >= low * 0.98);
    }
    if (unit === "bytes") {
      for (let power = Math.floor(Math.log2(low)); power <= Math.ceil(Math.log2(high)); power++) found.push(2 ** power);
    } else {
      const steps = high / low > 300 ? [1] : high / low > 30 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high) + 1; power++)
        for (const step of steps) found.push(step * 10 ** power);
    }
    const kept = found.filter((value) => value >= low * 0.7 && value <= high * 1.4);
    const every = Math.ceil(kept.length / (phone() ? 4 : 6));
    return kept.filter((_, index) => index % every === 0);
  }

  function layout(across, up, more) {
    const ink = colour("--ink"), line = colour("--line");
    const axis = { gridcolor: line, linecolor: line, zeroline: false, automargin: true, tickfont: { size: 12 }, tickangle: 0 };
    return Object.assign({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
      font: { family: "system-ui, sans-serif", size: 13, color: ink }, margin: { l: 8, r: 14, t: 10, b: 8 },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: line, font: { color: ink } },
      xaxis: Object.assign({ title: { text: across, standoff: 8 } }, axis),
      yaxis: Object.assign({ title: { text: up, standoff: 6 } }, axis),
    }, more || {});
  }

  const settings = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false, showTips: false };

  function draw(id, traces, arrangement) {
    const place = document.getElementById(id);
    if (place) Plotly.react(place, traces, arrangement, settings);
  }

  // Names of points, each where it covers neither a point, nor a bar, nor another name, and none where there is no room.
  // `points` are { x, y, text }, the most important first; `taken` are all that is drawn, { x, y, low, high }.
  function name(id, points, taken) {
    const place = document.getElementById(id);
    const { xaxis, yaxis } = place._fullLayout;
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = "11.5px system-ui, sans-serif";
    const boxes = [];
    const free = (box) => box[0] >= 0 && box[2] <= xaxis._length && box[1] >= 0 && box[3] <= yaxis._length &&
      boxes.every((other) => box[2] <= other[0] || other[2] <= box[0] || box[3] <= other[1] || other[3] <= box[1]);
    for (const one of taken) {
      const [x, y] = [xaxis.d2p(one.x), yaxis.d2p(one.y)];
      boxes.push([x - 7, y - 7, x + 7, y + 7]);
      if (one.high !== undefined) boxes.push([x - 3, yaxis.d2p(one.high), x + 3, yaxis.d2p(one.low)]);
    }
    const there = (place.layout.annotations || []).filter((one) => !one.name);
    for (const one of there) {
      const width = pen.measureText(one.text).width + 4, y = yaxis.d2p(one.y);
      const left = one.xanchor === "right" ? xaxis._length - width : 0;
      boxes.push([left, y - 18, left + width, y]);
    }
    const named = [];
    for (const { x, y, text } of points) {
      const [across, up, width] = [xaxis.d2p(x), yaxis.d2p(y), pen.measureText(text).width + 6];
      const tried = [];
      for (const far of [16, 28, 42, 58]) {
        const side = width / 2 + far - 6;
        for (const [dx, dy] of [[0, -far], [0, far], [side, 0], [-side, 0], [side, -far], [-side, -far], [side, far],
          [-side, far]]) tried.push([dx, dy, far]);
      }
      const found = tried.find(([dx, dy]) => free([across + dx - width / 2, up + dy - 8, across + dx + width / 2, up + dy + 8]));
      if (!found) continue;
      const [dx, dy, far] = found;
      boxes.push([across + dx - width / 2, up + dy - 8, across + dx + width / 2, up + dy + 8]);
      named.push({ name: "point", x: xaxis.type === "log" ? Math.log10(x) : x, y, text, font: { size: 11.5 }, borderpad: 0,
        ...(far > 16 ? { showarrow: true, arrowhead: 0, arrowwidth: 0.8, arrowcolor: colour("--soft"), ax: dx, ay: dy, standoff: 6 }
          : { showarrow: false, xshift: dx, yshift: -dy }) });
    }
    Plotly.relayout(place, { annotations: [...there, ...named] });
  }

  // The buttons in the heads of the columns sort.
  document.querySelectorAll("table.sortable").forEach((table) => {
    table.querySelectorAll("thead th button").forEach((button) => button.addEventListener("click", () => {
      const head = button.closest("th"), column = [...head.parentNode.children].indexOf(head);
      const up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const value = (row) => (row.cells[column] ? row.cells[column].dataset.value : undefined);
      const compared = (a, b) => {
        const [one, other] = [value(a), value(b)];
        if (!one || !other) return (one ? 0 : 1) - (other ? 0 : 1);
        const found = column ? Number(one) - Number(other) : one.localeCompare(other);
        return up ? found : -found;
      };
      [...body.rows].sort(compared).forEach((row) => body.append(row));
    }));
  });

  // Draw now, and again when the colours or the width change.
  function always(show) {
    let waiting, width = window.innerWidth;
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
    window.addEventListener("resize", () => {
      if (window.innerWidth === width) return;
      width = window.innerWidth;
      clearTimeout(waiting);
      waiting = setTimeout(show, 150);
    });
    show();
    document.documentElement.dataset.drawn = "yes";
  }

  return { colour, faint, short, marks, layout, draw, name, always };
})();
