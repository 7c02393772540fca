"""What the steering page does in the browser itself: keys, what is pointed at, links, files."""

KEYS = {
    "ArrowRight": "next",
    "n": "next",
    "ArrowLeft": "previous",
    "p": "previous",
    "r": "random",
    "Escape": "reset-all",
    "0": "reset-all",
    "z": "undo",
    "y": "redo",
}
"""Keys, and the buttons that they press."""

READY = """
if (window.saefw_ready) return
window.saefw_ready = true
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
  const found = feature == null ? null : heat.data[feature]
  const value = Array.from(found ?? over.data.value, (v) => (found == null ? 0 : Math.min(1, v)))
  over.data = {...over.data, value, alpha: value.map((v) => (v > 0 ? 0.3 + 0.6 * v : 0))}
}
document.addEventListener("pointerover", point)
document.addEventListener("focusin", point)
"""
"""Once a page is there; `keys` is KEYS."""

LINK = """
clearTimeout(window.saefw_link)
window.saefw_link = setTimeout(() => history.replaceState(null, "", cb_obj.tags[0]), 250)
"""
"""When the link of the page changes: browsers allow few changes a second."""

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
