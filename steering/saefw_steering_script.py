"""What the steering page does in the browser itself: keys, what is pointed at, links, files."""

KEYS = {
    "ArrowRight": "next",
    "n": "next",
    "ArrowLeft": "previous",
    "p": "previous",
    "r": "random",
    "0": "reset-all",
    "z": "undo",
    "y": "redo",
}
"""Keys, and the buttons that they press."""

READY = """
if (window.saefw_ready) return
window.saefw_ready = true
document.getElementById("loading")?.remove()
const model = (name) => {
  for (const doc of Bokeh.documents) {
    const found = doc.get_model_by_name(name)
    if (found != null) return found
  }
  return null
}
let pressed = 0
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.metaKey || event.ctrlKey) return
  const at = event.composedPath()[0]
  const typing = at.tagName == "SELECT" || at.tagName == "TEXTAREA" ||
    (at.tagName == "INPUT" && !["checkbox", "radio", "button"].includes(at.type))
  const moving = event.key.startsWith("Arrow") && at.getAttribute?.("role") == "slider"
  const signal = model("signal")
  if (typing || moving || !(event.key in keys) || signal == null) return
  event.preventDefault()
  pressed += 1
  signal.tags = [keys[event.key], pressed]
})
let shown = null
const point = (event) => {
  let feature = null
  for (const element of event.composedPath()) {
    if (!element.classList?.contains("feature")) continue
    feature = [...element.classList].find((name) => /^f-[0-9]+$/.test(name))?.slice(2) ?? null
    break
  }
  if (feature === shown) return
  const over = model("over"), heat = model("heat")
  if (over == null || heat == null) return
  shown = feature
  const found = feature == null ? null : heat.get_column(feature)
  const value = Array.from(over.get_column("value"), (_, i) => (found == null ? 0 : Math.min(1, found[i])))
  const alpha = value.map((v) => (v > 0 ? 0.3 + 0.6 * v : 0))
  over.data = {x: over.get_column("x"), y: over.get_column("y"), value, alpha}
}
document.addEventListener("click", (event) => {
  const at = event.composedPath().find((element) => element.dataset?.light != null)
  const signal = model("signal")
  if (at == null || signal == null) return
  pressed += 1
  signal.tags = ["light", pressed, Number(at.dataset.light)]
})
// Events of entering would not leave the shadow tree in which the pointer, or the focus, moves.
document.addEventListener("pointermove", point)
document.addEventListener("keyup", point)
model("live")?.properties.tags.change.emit()
"""
"""Once a page is there; `keys` is KEYS."""

LIVE = """
const [link, ...rows] = cb_obj.tags
for (const [name, text, classes] of rows) {
  const model = cb_obj.document?.get_model_by_name(name)
  if (model == null) continue
  // Silently, since a change that Bokeh hears of makes it lay out the whole page; what is not built yet will find it.
  if (text != null && text != model.text) {
    model.setv({text}, {silent: true})
    const place = cb_context.index.find_one(model)?.markup_el
    if (place != null) place.innerHTML = text
  }
  if (classes != null && classes.join() != model.css_classes.join()) {
    const look = cb_context.index.find_one(model)?.el.classList
    look?.remove(...model.css_classes)
    look?.add(...classes)
    model.setv({css_classes: classes}, {silent: true})
  }
}
// Browsers allow few changes of the address a second.
clearTimeout(window.saefw_link)
window.saefw_link = setTimeout(() => history.replaceState(null, "", link), 250)
"""
"""When there is something new: the link of the page, then rows of a model's name, its HTML or null, its classes or
null."""

FILE = """
const [name, kind, base64] = cb_obj.tags
const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))
const anchor = document.createElement("a")
anchor.href = URL.createObjectURL(new Blob([bytes], {type: kind}))
anchor.download = name
anchor.click()
setTimeout(() => URL.revokeObjectURL(anchor.href), 10000)
"""
"""When there is a file to be saved."""
