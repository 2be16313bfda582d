const figures = read("data");
function drawAll() {
  figures.forEach((figure, i) => Plotly.react(`figure-${i}`, figure.data, inked(figure.layout), CONFIG));
}
drawAll();
media.addEventListener("change", drawAll);
