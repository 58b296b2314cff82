const lists = JSON.parse(document.getElementById("data").textContent)
const names = {surprising: "Most surprising", conflicting: "Most conflicting", typical: "Typical"}
const [tabs, box, detail] = ["tabs", "examples", "detail"].map(id => document.getElementById(id))
const quoted = text => "“" + plain(text).replace(/\n/g, "↵").replace(/ /g, "␣") + "”"
function show(name) {
  for (const tab of tabs.children) tab.setAttribute("aria-selected", tab.dataset.name === name)
  box.replaceChildren()
  if (!lists[name].length) box.append(make("p", "", "None."))
  for (const example of lists[name]) {
    const card = make("div", "example"), text = make("div", "text")
    const group = example.group === null ? "" : ", " + example.group
    card.append(make("h3", "", `${example.is_part ? "part of " : ""}${example.row < 0 ? "an example" : "row " + example.row}${group}: ${example.tokens} target tokens, mean p ${example.prob.toFixed(3)}, `
      + `mean -log p ${example.nll.toFixed(2)}`))
    text.dir = "auto"
    if (example.cut[0]) text.append(`… ${example.cut[0]} tokens … `)
    const at = new Map(example.targets.map((place, i) => [place, i]))
    example.text.forEach((piece, place) => {
      const i = at.get(place)
      if (i === undefined) { text.append(visible(piece)); return }
      const token = make("span", "t", visible(piece))
      token.dataset.b = Math.min(9, Math.floor(example.p[i] * 10))
      if (example.entropy[i] <= 0.5 && example.p[i] <= 0.05) token.classList.add("conflict")
      token.said = `${quoted(piece)}  p ${example.p[i]}, rank ${example.rank[i] + 1}; expected ${quoted(example.expected[i])} `
        + `with p ${example.top1_p[i]}; entropy ${example.entropy[i]}`
      text.append(token)
    })
    if (example.cut[1]) text.append(` … ${example.cut[1]} tokens …`)
    card.append(text)
    box.append(card)
  }
}
for (const name of Object.keys(names)) {
  const tab = make("button", "", names[name])
  tab.dataset.name = name
  tab.setAttribute("role", "tab")
  tab.onclick = () => show(name)
  tabs.append(tab)
}
const tell = event => { if (event.target.said) detail.textContent = event.target.said }
box.addEventListener("mouseover", tell)
box.addEventListener("click", tell)
show("surprising")
