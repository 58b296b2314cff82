const data = JSON.parse(document.getElementById("data").textContent)
const [slider, share, box, more, detail, when, where] =
  ["cut", "share", "rows", "more", "detail", "when", "where"].map(id => document.getElementById(id))
const count = number => number.toLocaleString("en-US")
const part = (few, all) => `${count(few)} of ${count(all)} (${(100 * few / Math.max(all, 1)).toFixed(1)} %)`
const AT_ONCE = 50
let after = true, next = 0
const cut = () => data.cuts[+slider.value]
function colour(token) {
  token.dataset.b = Math.min(9, Math.floor(token.p[+after] / 100))
}
function card(row, place) {
  const made = make("div", "example"), text = make("div", "text")
  made.place = place
  made.append(make("h3", "", `row ${row.row}: score ${row.score.toFixed(3)}, ${row.targets} target tokens, `
    + `mean p ${row.before.toFixed(3)} before, ${row.after.toFixed(3)} after`))
  text.dir = "auto"
  if (row.cut[0]) text.append(`… ${row.cut[0]} tokens … `)
  row.pieces.forEach((piece, i) => {
    if (row.p[i] === null) { text.append(visible(piece)); return }
    const token = make("span", "t", visible(piece))
    token.p = row.p[i]
    token.said = `p ${(token.p[0] / 1000).toFixed(3)} before, ${(token.p[1] / 1000).toFixed(3)} after`
    colour(token)
    text.append(token)
  })
  if (row.cut[1]) text.append(` … ${row.cut[1]} tokens …`)
  made.append(text)
  return made
}
function mark() {
  for (const each of box.children) each.classList.toggle("dropped", each.place < cut()[1])
}
function show(from) {
  if (from !== undefined) { box.replaceChildren(); next = from; box.scrollTop = 0 }
  const rows = data.rows.slice(next, next + AT_ONCE)
  box.append(...rows.map((row, i) => card(row, next + i)))
  next += rows.length
  more.hidden = next >= data.rows.length
  mark()
}
function move() {
  const [number, rows, tokens] = cut()
  share.textContent = `Noise score above ${number}: drops ${part(rows, data.size)} rows, ${part(tokens, data.tokens)} target tokens.`
  for (const id of ["drop", "weighted"]) {
    const pre = document.getElementById(id)
    pre.textContent = pre.dataset.text.replace("CUT", number)
  }
  mark()
}
function tab(nav, name, chosen, act) {
  const made = make("button", "", name)
  made.type = "button"
  made.setAttribute("role", "tab")
  made.setAttribute("aria-selected", chosen)
  made.onclick = () => {
    for (const other of nav.children) other.setAttribute("aria-selected", other === made)
    act()
  }
  nav.append(made)
}
const recolour = to => { after = to; box.querySelectorAll(".t").forEach(colour) }
tab(when, "Before training", false, () => recolour(false))
tab(when, "After cross-fitting", true, () => recolour(true))
tab(where, "Highest scores", true, () => show(0))
tab(where, "Around the cut", false, () => show(Math.max(0, Math.min(data.rows.length - 1, cut()[1] - 10))))
const tell = event => { if (event.target.said) detail.textContent = event.target.said }
box.addEventListener("mouseover", tell)
box.addEventListener("click", tell)
slider.addEventListener("input", move)
more.onclick = () => show()
show(0)
move()
