// Units: numbers as people read them.
"use strict";

const Units = (() => {
  const BYTES = [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [1024, "KiB"], [1, "B"]];
  const SECONDS = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]];

  function scaled(value, units) {
    const found = value === 0 ? units.find(([size]) => size === 1) : units.find(([size]) => Math.abs(value) >= size);
    const [size, name] = found || units[units.length - 1];
    const number = value / size;
    const digits = Math.abs(number) >= 100 ? 1 : Math.abs(number) >= 10 ? 2 : 3;
    return `${number.toFixed(size === 1 && Number.isInteger(number) ? 0 : digits)} ${name}`;
  }

  const seconds = value => scaled(value, SECONDS);
  const bytes = value => scaled(value, BYTES);
  const percent = value => `${(100 * value).toFixed(1)} %`;
  // Without zeros at the end, for axes: 20.00 ms is 20 ms.
  const short = text => text.replace(/(\.\d*?)0+ /, "$1 ").replace(". ", " ").trim();
  return { seconds, bytes, percent, short };
})();
