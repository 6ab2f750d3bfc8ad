// Elements: what pages are put together of. Texts are texts, whatever they hold.
"use strict";

const Elements = (() => {
  // An element with its properties, styles and children.
  function make(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    if (properties?.style) Object.assign(made.style, properties.style);
    made.append(...children);
    return made;
  }

  // What stands large at a page's head: values, each above what it is.
  const figures = pairs => pairs.map(([value, name]) => make("li", {}, make("b", {}, value), make("span", {}, name)));
  return { figures, make };
})();
