export default {
  render({ model, el }) {
    return renderSamplingControls(model, el);
  },
};
