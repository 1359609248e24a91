"use strict";
// What the other parts share: the data, elements, numbers as text, colours, what the user chose.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const $ = (id) => document.getElementById(id);

/** An element; text among the children becomes text, never markup. */
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Text for plotly, which reads a little markup. */
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// ---- what the user chose; kept for as long as the tab lives, so that a page that loads itself again stays as it was

const KEY = "ftlab report " + location.pathname;
const state = Object.assign(
  {
    sort: null, descending: false, filter: "", hidden: [], off: null, x: "step", smooth: 30, log: false, colour: null,
    training: true, validation: true, metric: null, hx: null, hy: null, baseline: null, prompt: 0, theme: null,
  },
  remembered(),
);

function remembered() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY)) || {};
  } catch {
    return {}; // no storage for pages opened from a file, in some browsers
  }
}

function remember() {
  try {
    sessionStorage.setItem(KEY, JSON.stringify(state));
  } catch {
    // as above
  }
}

// ---- numbers

const thousands = (value, digits = 0) =>
  value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });

function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} m ${String(s % 60).padStart(2, "0")} s`;
  return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} m`;
}

/** A number on its own, to four digits. */
function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size >= 1e12) return value.toExponential().replace("+", "");
  if (size >= 1e9) return `${trimmed(value / 1e9)} G`;
  if (size >= 1e6) return `${trimmed(value / 1e6)} M`;
  if (size >= 1e3) return thousands(value, size < 1e4 && !Number.isInteger(value) ? 1 : 0);
  if (size !== 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("-", "−").replace("e-", "e−");
  return trimmed(value);
}

/** A mean and the half width of its interval, no finer than the interval tells. */
function band(mean, half, sign = false) {
  const plus = sign && mean > 0 ? "+" : "";
  if (half === null) return plus + short(mean);
  const digits = half > 0 ? Math.min(8, Math.max(0, 1 - Math.floor(Math.log10(half)))) : 4;
  return `${plus}${thousands(mean, digits).replace("-", "−")} ± ${thousands(half, digits)}`;
}

const trimmed = (value) => String(Number(value.toPrecision(4))).replace("-", "−");

/** How a whole column is written: one number of decimals, so that they stand below each other. */
function columnFormat(column) {
  if (column.key === "duration_s") return duration;
  const numbers = column.cells.filter((cell) => typeof cell === "number");
  const sizes = numbers.map(Math.abs);
  const most = Math.max(...sizes);
  if (column.setting || !numbers.length) return short;
  if (numbers.every(Number.isInteger)) return most >= 1e7 ? short : thousands;
  if (most >= 1e6 || (most > 0 && most < 1e-3)) return short;
  const digits = most >= 1000 ? 0 : most >= 100 ? 1 : most >= 10 ? 3 : 4;
  return (value) => thousands(value, digits);
}

// ---- theme

const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (state.theme ?? (systemDark.matches ? "dark" : "light")) === "dark";

function applyTheme() {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  $("theme").textContent = isDark() ? "☀ light" : "☾ dark";
  const style = getComputedStyle(document.documentElement);
  for (const name of ["text", "muted", "line", "card", "accent"]) COLOURS[name] = style.getPropertyValue(`--${name}`).trim();
}

const COLOURS = {}; // of the theme; asked for once, because a browser works out the whole page's style to tell one
const cssColour = (name) => COLOURS[name];

// Okabe and Ito's colours, which colour-blind readers tell apart, adjusted to each ground; viridis where order matters.
const CATEGORIES = {
  light: ["#0072b2", "#d55e00", "#009e73", "#b3558c", "#c98a00", "#3aa0d8", "#6b4c9a", "#4d545c"],
  dark: ["#56b4e9", "#f08c3a", "#2cc295", "#e79bc4", "#f0e442", "#5b8fe9", "#b79be8", "#c3cad2"],
};
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];

const categories = () => CATEGORIES[isDark() ? "dark" : "light"];
const ramp = () => (isDark() ? VIRIDIS.slice(2) : [...VIRIDIS.slice(0, 7), "#93b81f"]); // nothing that vanishes into the ground

/** The ramp's colour at t in [0, 1]. */
function at(t) {
  const stops = ramp();
  const place = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(place), stops.length - 2);
  const part = (k, at) => parseInt(stops[k].slice(1 + 2 * at, 3 + 2 * at), 16);
  const mixed = [0, 1, 2].map((c) => Math.round(part(i, c) + (place - i) * (part(i + 1, c) - part(i, c))));
  return `rgb(${mixed.join(",")})`;
}
