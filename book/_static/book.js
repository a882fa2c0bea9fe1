// An equation or a table wider than its box scrolls there, and takes the focus so that the arrow keys can do it; others
// do not.
(() => {
  const boxes = ".bd-article div.math, .bd-article mjx-container[display], .bd-article table";
  const update = () => {
    for (const box of document.querySelectorAll(boxes)) {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  const start = () => {
    // runs when formulas have been drawn, the window changes its width, or a hint is opened
    const observer = new ResizeObserver(update);
    for (const box of document.querySelectorAll(boxes)) observer.observe(box);
    window.MathJax?.startup?.promise?.then(update);
    update();
  };
  window.addEventListener("load", start);
})();
