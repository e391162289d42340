// Long lists are divided into pages. The first page is in the document; each of the others is in a <template class="page">
// after it, so that its images are only decoded and laid out when it is shown.
for (const list of document.querySelectorAll(":has(> template.page)")) {
  const later = [...list.querySelectorAll(":scope > template.page")];
  for (const page of later) page.remove();
  const pages = [[...list.childNodes], ...later];
  const container = list.closest(".scroll") || list;
  const make = (tag, text, values) => {
    const element = Object.assign(document.createElement(tag), values);
    element.append(text);
    return element;
  };
  let current = 0;
  const show = (wanted) => {
    current = Math.min(Math.max(wanted, 0), pages.length - 1);
    if (!Array.isArray(pages[current])) pages[current] = [...pages[current].content.childNodes];
    list.replaceChildren(...pages[current]);
    place.textContent = `Page ${current + 1} of ${pages.length}`;
    number.value = "";
    back.disabled = current === 0;
    next.disabled = current === pages.length - 1;
    container.scrollIntoView({ block: "start" });
  };
  const back = make("button", "Previous", { type: "button", disabled: true, onclick: () => show(current - 1) });
  const next = make("button", "Next", { type: "button", onclick: () => show(current + 1) });
  const place = make("span", `Page 1 of ${pages.length}`, { role: "status" });
  const number = make("input", "", { type: "number", min: 1, max: pages.length });
  number.onchange = () => number.value && show(Math.trunc(number.valueAsNumber) - 1);
  const go = make("label", "Go to page ", {});
  go.append(number);
  const bar = make("nav", back, { className: "pages" });
  bar.setAttribute("aria-label", `Pages of ${list.dataset.pages}`);
  bar.append(place, next, go);
  container.after(bar);
}
